"""Load the two splits of a dataset: the examples to learn from and those to answer afterwards."""

import contextlib
import glob
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtcompile.tools.data.formats import FORMATS, Example, Record, TaskFormat, read_fields, summarisation
from gtcompile.tools.data.splits import SplitSlice, parse_split
from gtcompile.tools.models.demo_data import summarisation_examples

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""The builder of `datasets` that reads files with a suffix."""
DEMO_COUNTS = {"train": 1024, "test": 128}
"""Number of examples that are generated for each of the demo's splits."""
Reader = Callable[[str], tuple[str, list[Record]]]
"""Reads a split by its name: returns the name of the file (or of the split) for messages, and the records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where examples come from; everything about it is checked before any data is read."""

    dataset: str
    """A known dataset, or the path of a file."""
    format: TaskFormat
    """How its records become examples."""
    splits: tuple[SplitSlice, SplitSlice]
    """Splits to train on and to evaluate on."""
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


def find_source(
    dataset: str,
    *,
    data_dir: Path | None = None,
    splits: tuple[str | None, str | None] = (None, None),
    fields: tuple[str | None, str | None] = (None, None),
) -> Source:
    """Find a dataset by name, or a file, without reading it.

    Args:
        dataset: one of `FORMATS`, or the path of a `.jsonl`, `.json`, `.csv` or `.parquet` file.
        data_dir: folder with the authors' files, or a folder of such folders; None loads from the hub.
        splits: training and evaluation split, or shares of one such as `valid[:80%]`; None takes the usual.
        fields: source and target field of a file; None takes `source` and `target`.

    Raises:
        ValueError: there is no such dataset, folder or split, or the two splits share records.
    """
    known, defaults, read = _origin(dataset, data_dir, fields)
    train, evaluation = (parse_split(given or usual) for given, usual in zip(splits, defaults, strict=True))
    if train.overlaps(evaluation):
        raise ValueError(
            f"training on {train} and evaluation on {evaluation} would share records. "
            f"Choose --train-split and --eval-split apart, or shares such as valid[:80%] and valid[80%:]."
        )
    return Source(dataset=dataset, format=known, splits=(train, evaluation), read=read)


def load_task(source: Source, limits: tuple[int | None, int | None] = (None, None)) -> Task:
    """Read the examples of both splits.

    Args:
        source: where they come from.
        limits: most training and evaluation examples, the first of each split; None takes all.

    Raises:
        ValueError: the data cannot be read, is empty, or lacks a field; names the file and the record.
    """
    train, evaluation = (_examples(source, share) for share in source.splits)
    origin = f"{source.dataset} ({source.splits[0]}, {source.splits[1]})"
    return Task(
        format=source.format,
        train=train[: limits[0]],
        evaluation=merge_references(evaluation)[: limits[1]],
        origin=origin,
    )


def _examples(source: Source, share: SplitSlice) -> tuple[Example, ...]:
    examples = []
    name, records = source.read(share.split)
    for number, record in share(list(enumerate(records, 1))):
        try:
            examples.append(source.format.read(record))
        except ValueError as error:
            raise ValueError(f"{name}, record {number}: {error}") from error
    if not examples:
        raise ValueError(f"{name} has no record in {share}")
    return tuple(examples)


def _origin(
    dataset: str, data_dir: Path | None, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Reader]:
    """The format of a dataset, its usual splits, and how to read a split."""
    known = FORMATS.get(dataset)
    if known is None:
        return _own_file(dataset, fields)
    if any(fields):
        raise ValueError(
            f"--source-field and --target-field are for files of your own; {dataset} has its own fields"
        )
    if dataset == "demo":
        return known, known.file_splits, _generate
    if data_dir is not None:
        folder = _data_folder(data_dir, dataset)
        return known, known.file_splits, lambda split: read_folder(folder, split, dataset)
    return known, known.hub_splits, lambda split: read_hub(split, known)


def _own_file(
    dataset: str, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Reader]:
    path = Path(dataset)
    if path.suffix not in BUILDERS or not path.is_file():
        raise ValueError(
            f"--dataset: expected one of {', '.join(FORMATS)} or a file that exists ({', '.join(BUILDERS)}), "
            f"got {dataset!r}"
        )
    source, target = fields[0] or "source", fields[1] or "target"
    known = summarisation(path.name, lambda record: read_fields(record, source, target), 64)

    def read(split: str) -> tuple[str, list[Record]]:
        if split != "all":
            raise ValueError(f"{path} has one split, all; got {split!r}. A share of it is written all[:90%].")
        return str(path), read_file(path)

    return known, ("all[:90%]", "all[90%:]"), read


def _data_folder(data_dir: Path, dataset: str) -> Path:
    folder = data_dir / dataset if (data_dir / dataset).is_dir() else data_dir
    if not folder.is_dir():
        raise ValueError(f"--data-dir: no folder {folder}")
    return folder


def _generate(split: str) -> tuple[str, list[Record]]:
    if split not in DEMO_COUNTS:
        raise ValueError(f"the demo has the splits {', '.join(DEMO_COUNTS)}; got {split!r}")
    return f"the demo's {split} split", list(summarisation_examples(split, DEMO_COUNTS[split]))  # type: ignore[arg-type]


def read_file(path: Path) -> list[Record]:
    """Read the records of a file with `datasets`, which decides by the suffix how.

    Fields of a `.csv` file are texts, whatever they look like. No cache is kept.

    Raises:
        ValueError: the file cannot be read, or holds no record; names the file.
    """
    import datasets  # takes seconds to import, and only files need it

    builder = BUILDERS[path.suffix]
    # a bracket in the path would be taken for a pattern
    where: dict[str, Any] = {"data_files": glob.escape(str(path)), "split": "train"}
    if path.stat().st_size == 0:
        raise ValueError(f"{path} holds no record")
    try:
        with tempfile.TemporaryDirectory() as cache, _without_messages():
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


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Turn off the progress bars and log lines of `datasets`; an error reaches the user by its exception."""
    import datasets

    logger, bars = logging.getLogger("datasets"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def read_folder(folder: Path, split: str, dataset: str) -> tuple[str, list[Record]]:
    """Read one split from a folder that holds a file per split; returns the file's path and the records.

    A file `<split>-labels.lst` in it holds one label per record; they become the field `label`.

    Raises:
        ValueError: the split is not there; the message lists the splits that are.
    """
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS}
    if split not in found:
        raise ValueError(
            f"{dataset} in {folder} has no {split!r} split; it has {', '.join(found) or 'none'}. "
            f"Name another with --train-split or --eval-split; a share of one is written valid[:80%]."
        )
    path = found[split]
    return str(path), _with_labels(read_file(path), folder / f"{split}-labels.lst")


def _with_labels(records: list[Record], labels: Path) -> list[Record]:
    if not labels.exists():
        return records
    values = labels.read_text("utf-8").split()
    if len(values) != len(records):
        raise ValueError(f"{labels} has {len(values)} labels for {len(records)} records")
    if wrong := [value for value in values if not value.isdecimal()]:
        raise ValueError(f"{labels}: expected whole numbers as labels, got {wrong[0]!r}")
    return [{**record, "label": int(value)} for record, value in zip(records, values, strict=True)]


def read_hub(split: str, known: TaskFormat) -> tuple[str, list[Record]]:
    """Read one split of a known dataset from the Hugging Face hub; returns its name and the records.

    Raises:
        ValueError: it could not be loaded; the message says how to use a local copy.
    """
    import datasets

    try:
        return f"{known.hub['path']}, {split}", list(datasets.load_dataset(**known.hub, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"could not load split {split!r} of {known.hub['path']} from the hub ({reason}). "
            f"If its files are on this machine, pass their folder as --data-dir."
        ) from error


def merge_references(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Merge examples with the same source into one with all their references, in order of appearance.

    >>> merge_references([Example("a", ("x",)), Example("b", ("y",)), Example("a", ("z",))])
    (Example(source='a', references=('x', 'z')), Example(source='b', references=('y',)))
    """
    merged: dict[str, dict[str, None]] = {}
    for example in examples:
        merged.setdefault(example.source, {}).update(dict.fromkeys(example.references))
    return tuple(Example(source, tuple(references)) for source, references in merged.items())
