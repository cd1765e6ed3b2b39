"""Load the two splits of a dataset: the examples to learn from and those to answer afterwards."""

import glob
import importlib.util
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gtcompile.tools.data.formats import FORMATS, Example, Record, TaskFormat, format_of_fields
from gtcompile.tools.models.demo_data import summarisation_examples

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""The builder of `datasets` that reads files with a suffix."""
DEMO_COUNTS = {"train": 1024, "validation": 128, "test": 128}
"""Number of examples that are generated for each of the demo's splits."""
Reader = Callable[[str], tuple[str, Sequence[Record]]]
"""Reads a split by its name: returns the name of the file (or of the split) for messages, and the records."""
_SPLIT = re.compile(r"(?P<split>[\w.-]+)(?:\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\])?")
_ON_THE_HUB = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?::(?P<name>[\w.-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where examples come from; everything about it is checked before any data is read."""

    dataset: str
    """A known dataset, the path of a file, or a dataset of the hub."""
    format: TaskFormat
    """How its records become examples."""
    splits: tuple[str, str]
    """Splits to train on and to evaluate on, or shares such as `valid[:80%]`."""
    read: Reader
    """Reads one split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A dataset ready to be tokenized."""

    format: TaskFormat
    """Prompt, metric and lengths."""
    train: tuple[Example, ...]
    """Training examples in the order of the data."""
    evaluation: tuple[Example, ...]
    """Examples to answer after training; none of their records is in `train`."""
    origin: str
    """Dataset and splits in words."""

    def __str__(self) -> str:
        return f"{self.origin}: {len(self.train)} training examples, {len(self.evaluation)} for evaluation"

    @property
    def duplicates(self) -> int:
        """How many evaluation examples have a text that is also trained on, in another record."""
        known = {example.source for example in self.train}
        return sum(example.source in known for example in self.evaluation)


def find_source(
    dataset: str,
    *,
    data_dir: Path | None = None,
    splits: tuple[str | None, str | None] = (None, None),
    fields: tuple[str | None, str | None] = (None, None),
) -> Source:
    """Find a dataset by name, or a file, without reading it.

    Args:
        dataset: one of `FORMATS`, the path of a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a dataset of
            the hub as `owner/name` or `owner/name:configuration`.
        data_dir: folder with the authors' files, or a folder of such folders; None loads from the hub.
        splits: training and evaluation split, or shares of one such as `valid[:80%]`; None takes the usual.
        fields: source and target field of data that is not in `FORMATS`; None takes `source` and `target`, or
            a chat in `messages`.

    Raises:
        ValueError: there is no such dataset, folder or split, or the two splits share records.
    """
    known, defaults, read = _origin(dataset, data_dir, fields)
    train, evaluation = (given or usual for given, usual in zip(splits, defaults, strict=True))
    (name, start, stop), (other, begin, end) = map(parse_split, (train, evaluation))
    apart = name == other and (end <= start or stop <= begin)
    if not apart and (name == other or "all" in (name, other)):  # all is every split of a dataset together
        raise ValueError(
            f"training on {train} and evaluation on {evaluation} would share records. "
            f"Choose --train-split and --eval-split apart, or shares such as valid[:80%] and valid[80%:]."
        )
    return Source(dataset=dataset, format=known, splits=(train, evaluation), read=read)


def parse_split(text: str) -> tuple[str, int, int]:
    """Read `split`, `split[:80%]`, `split[80%:]` or `split[20%:40%]`; `datasets` takes seconds to import.

    Returns:
        The split's name, and where the share begins and ends, in percent of its records.

    Raises:
        ValueError: `text` is not of this form, or the share is empty.

    >>> parse_split("valid[80%:]")
    ('valid', 80, 100)
    """
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a split such as train or valid[:80%], got {text!r}")
    start, stop = int(match["start"] or 0), int(match["stop"] or 100)
    if not 0 <= start < stop <= 100:
        raise ValueError(f"{text!r} is empty: expected percentages that rise from 0 to 100")
    return match["split"], start, stop


def load_task(source: Source, limits: tuple[int | None, int | None] = (None, None)) -> Task:
    """Read the examples of both splits.

    Args:
        source: where they come from.
        limits: most training and evaluation examples, the first of each split; None takes all.

    Raises:
        ValueError: the data cannot be read, is empty, or lacks a field; names the file and the record.
    """
    train, evaluation = (examples_of(source, share) for share in source.splits)
    origin = f"{source.dataset} ({source.splits[0]}, {source.splits[1]})"
    return Task(
        format=source.format,
        train=train[: limits[0]],
        evaluation=merge_references(evaluation)[: limits[1]],
        origin=origin,
    )


def examples_of(source: Source, share: str) -> tuple[Example, ...]:
    """Read the examples of one split, or of a share of one such as `valid[:80%]`.

    Raises:
        ValueError: the data cannot be read, are empty, or lack a field; names the file and the record.
    """
    split, start, stop = parse_split(share)
    name, records = source.read(split)
    examples = []
    for index in range(len(records) * start // 100, len(records) * stop // 100):
        try:
            examples.append(source.format.read(records[index]))
        except ValueError as error:
            raise ValueError(f"{name}, record {index + 1}: {error}") from error
    if not examples:
        raise ValueError(f"{name} has no record in {share}")
    return tuple(examples)


def _origin(
    dataset: str, data_dir: Path | None, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Reader]:
    """The format of a dataset, its usual splits, and how to read a split."""
    path, hub = Path(dataset), _ON_THE_HUB.fullmatch(dataset)
    if dataset not in FORMATS and path.suffix in BUILDERS and path.is_file():
        own = format_of_fields(path.name, *fields)
        return own, ("all[:90%]", "all[90%:]"), partial(_read_own, path)
    if dataset not in FORMATS and path.suffix not in BUILDERS and hub:
        where = {key: value for key, value in hub.groupdict().items() if value}
        own = format_of_fields(dataset, *fields, hub=where)
        return own, own.hub_splits, partial(read_hub, own)
    if dataset not in FORMATS:
        raise ValueError(
            f"--dataset: expected one of {', '.join(FORMATS)}, a file that exists ({', '.join(BUILDERS)}), "
            f"or owner/name on the hub, got {dataset!r}"
        )
    known = FORMATS[dataset]
    if any(fields):
        raise ValueError(
            f"--source-field and --target-field are for data of your own; {dataset} has its own fields"
        )
    if dataset == "demo":
        return known, known.file_splits, _generate
    if data_dir is None and not known.package_folder:
        return known, known.hub_splits, partial(read_hub, known)
    folder = folder_of(dataset, data_dir or _folder_of_package(known.package_folder))
    return known, known.file_splits, partial(read_folder, folder, dataset)


def folder_of(dataset: str, data_dir: Path) -> Path:
    """The folder of a data set's files: `data_dir`, or the one with the data set's name in it.

    Raises:
        ValueError: there is no such folder.
    """
    folder = data_dir / dataset if (data_dir / dataset).is_dir() else data_dir
    if not folder.is_dir():
        raise ValueError(f"--data-dir: no folder {folder}")
    return folder


def splits_in(folder: Path) -> dict[str, Path]:
    """The file of each split in a folder, by the split's name."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS}


def _folder_of_package(path: str) -> Path:
    """A folder inside of an installed package, which is not imported."""
    package, _, below = path.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"--dataset: the data come with the package {package}: pip install {package}")
    return Path(found.origin).parent / below


def _generate(split: str) -> tuple[str, list[Record]]:
    if split not in DEMO_COUNTS:
        raise ValueError(f"the demo has the splits {', '.join(DEMO_COUNTS)}; got {split!r}")
    return f"the demo's {split} split", list(summarisation_examples(split, DEMO_COUNTS[split]))  # type: ignore[arg-type]


def _read_own(path: Path, split: str) -> tuple[str, list[Record]]:
    if split != "all":
        raise ValueError(f"{path.name} has one split, all, and shares of it such as all[:80%]; got {split!r}")
    return str(path), read_file(path)


def read_file(path: Path) -> list[Record]:
    """Read the records of a file with `datasets`, which decides by the suffix how.

    Fields of a `.csv` file are texts, whatever they look like. No cache is kept.

    Raises:
        ValueError: the file cannot be read, or holds no record; names the file.
    """
    import datasets  # takes seconds to import, and only files need it

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors reach the user by their exception
    builder = BUILDERS[path.suffix]
    # a bracket in the path would be taken for a pattern
    where: dict[str, Any] = {"data_files": glob.escape(str(path)), "split": "all"}
    if path.stat().st_size == 0:
        raise ValueError(f"{path} holds no record")
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(builder, cache_dir=cache, **where)
            if builder == "csv":
                texts = datasets.Features({name: datasets.Value("string") for name in table.column_names})
                options = {"features": texts, "keep_default_na": False}
                table = datasets.load_dataset(builder, cache_dir=cache, **where, **options)
            records: list[Record] = table.to_list()
    except Exception as error:  # each reader behind `datasets` raises errors of its own
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} holds no record") from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error
    return records


def read_folder(folder: Path, dataset: str, split: str) -> tuple[str, list[Record]]:
    """Read one split from a folder that holds a file per split; returns the file's path and the records.

    A file `<split>-labels.lst` in it holds one label per record; they become the field `label`.

    Raises:
        ValueError: the split is not there; the message lists the splits that are.
    """
    found = splits_in(folder)
    if split not in found:
        raise ValueError(
            f"{dataset} in {folder} has no {split!r} split; it has {', '.join(found) or 'none'}. "
            f"Name another with --train-split or --eval-split; a share of one is written valid[:80%]."
        )
    records, labels = read_file(found[split]), folder / f"{split}-labels.lst"
    if labels.exists():
        values = labels.read_text("utf-8").split()
        if len(values) != len(records):
            raise ValueError(f"{labels} has {len(values)} labels for {len(records)} records")
        if wrong := [value for value in values if not value.isdecimal()]:
            raise ValueError(f"{labels}: expected whole numbers as labels, got {wrong[0]!r}")
        records = [{**record, "label": int(value)} for record, value in zip(records, values, strict=True)]
    return str(found[split]), records


def read_hub(known: TaskFormat, split: str) -> tuple[str, Sequence[Record]]:
    """Read one split from the Hugging Face hub; returns its name and the records.

    Raises:
        ValueError: it could not be loaded; the message says how to use a local copy.
    """
    import datasets

    try:
        return f"{known.hub['path']}, {split}", datasets.load_dataset(**known.hub, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"could not load split {split!r} of {known.hub['path']} from the hub ({reason}). "
            f"If its files are on this machine, pass their folder as --data-dir."
        ) from error


def merge_references(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Merge examples with the same source into one with all their references, in order of appearance.

    Examples with different wrong answers stay apart.

    >>> merge_references([Example("a", ("x",)), Example("a", ("z",))])
    (Example(source='a', references=('x', 'z'), wrong=()),)
    """
    merged: dict[Any, dict[str, None]] = {}
    for example in examples:
        key = example.source, example.wrong
        merged.setdefault(key, {}).update(dict.fromkeys(example.references))
    return tuple(Example(source, tuple(references), wrong) for (source, wrong), references in merged.items())
