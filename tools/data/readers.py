"""Read the records of one split of a dataset from files or from the hub."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv")
"""Of the files that `read_file` reads."""

_SLICE = re.compile(r"(?P<split>[\w.-]+)(?:\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\])?")


@dataclass(frozen=True, slots=True)
class SplitSlice:
    """A split, or a share of it such as `valid[:80%]` and `valid[80%:]`."""

    split: str
    """Name of the split."""
    start: int = 0
    """Percentage of the records to pass over."""
    stop: int = 100
    """Percentage of the records to end at."""

    def __str__(self) -> str:
        whole = (self.start, self.stop) == (0, 100)
        return self.split if whole else f"{self.split}[{self.start}%:{self.stop}%]"

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """The share of `records`; two shares that meet have no record in common."""
        return list(records[len(records) * self.start // 100 : len(records) * self.stop // 100])

    def overlaps(self, other: "SplitSlice") -> bool:
        """Whether some record may belong to both."""
        return self.split == other.split and self.start < other.stop and other.start < self.stop


def parse_split(text: str) -> SplitSlice:
    """Read `split`, `split[:80%]`, `split[80%:]` or `split[20%:40%]`.

    Raises:
        ValueError: `text` is none of these, or the share is empty.

    >>> parse_split("valid[80%:]")
    SplitSlice(split='valid', start=80, stop=100)
    """
    match = _SLICE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a split such as train or valid[:80%], got {text!r}")
    parsed = SplitSlice(match["split"], int(match["start"] or 0), int(match["stop"] or 100))
    if not 0 <= parsed.start < parsed.stop <= 100:
        raise ValueError(f"{text!r} is empty: expected percentages that rise from 0 to 100")
    return parsed


def read_file(path: Path) -> list[Record]:
    """Read a file of one JSON object per line (`.jsonl`), one list of objects (`.json`), or rows (`.csv`).

    Raises:
        ValueError: naming the file, and the line where there is one, that is not what its name says.
    """
    if path.suffix == ".csv":
        return _read_rows(path)
    if path.suffix == ".json":
        records = _parse(_text_of(path), str(path))
    else:
        lines = _text_of(path).split("\n")  # not splitlines: a text may hold U+2028 and the like
        records = [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected JSON objects, one per record")
    return records


def _read_rows(path: Path) -> list[Record]:
    """The rows of a file with commas between and a first row of names; what a row lacks is no field of it."""
    rows = csv.DictReader(io.StringIO(_text_of(path), newline=""), restkey="", strict=True)
    try:
        return [_filled(row, f"{path}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num + 1}: not comma-separated rows: {error}") from error


def _filled(row: dict[str, Any], where: str) -> Record:
    if "" in row:
        raise ValueError(f"{where}: the row has more fields than the first row has names")
    return {name: value for name, value in row.items() if value is not None}


def _text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#04x}"
        ) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def read_folder(folder: Path, split: str, *, dataset: str) -> list[Record]:
    """Read one split of `dataset` from `folder` or `folder/dataset`.

    A file `<split>-labels.lst` beside the records holds one label per record and becomes their field `label`.

    Raises:
        ValueError: the folder or the split is not there; the message lists the splits that are.
    """
    folder = folder / dataset if (folder / dataset).is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"no data folder {folder}")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl")}
    if split not in found:
        raise ValueError(
            f"{dataset} in {folder} has no {split!r} split; it has {', '.join(found) or 'none'}. "
            f"Name another with --train-split or --eval-split; a share of one is written valid[:80%]."
        )
    return _with_labels(read_file(found[split]), folder / f"{split}-labels.lst")


def _with_labels(records: list[Record], labels: Path) -> list[Record]:
    if not labels.exists():
        return records
    values = labels.read_text("utf-8").split()
    if len(values) != len(records):
        raise ValueError(f"{labels} has {len(values)} labels for {len(records)} records")
    return [{**record, "label": int(value)} for record, value in zip(records, values, strict=True)]


def read_hub(split: str, *, load_arguments: Mapping[str, str]) -> list[Record]:
    """Read one split from the Hugging Face hub.

    Args:
        split: as the hub calls it.
        load_arguments: for `datasets.load_dataset`.

    Raises:
        ValueError: it could not be had; the message says how to use a local copy.
    """
    import datasets  # seconds to import, and only needed here

    try:
        return list(datasets.load_dataset(**load_arguments, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"could not load split {split!r} of {load_arguments['path']} from the hub ({reason}). "
            f"With the files on this machine, pass their folder as --data-dir."
        ) from error


def value_of(record: Record, name: str) -> Any:
    """The value of a field that must be there.

    Raises:
        ValueError: listing the fields the record has.
    """
    if name not in record:
        raise ValueError(f"the dataset has no field {name!r}; it has {', '.join(map(repr, record))}")
    return record[name]


def numbered(read: Callable[[Record], Any], records: Sequence[Record]) -> list[Any]:
    """Apply `read` to every record; what it raises names the record."""
    results = []
    for number, record in enumerate(records, 1):
        try:
            results.append(read(record))
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
    return results
