"""Load the two splits of a dataset: the examples to learn from and those to answer afterwards."""

import contextlib
import glob
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gtcompile.tools.data.formats import FORMATS, Example, TaskFormat, format_of_fields
from gtcompile.tools.models.demo_data import summarisation_examples

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""The builder of `datasets` that reads files with a suffix."""
DEMO_COUNTS = {"train": 1024, "test": 128}
"""Number of examples that are generated for each of the demo's splits."""
Reader = Callable[[str], tuple[str, Any]]
"""Reads a split or a share of one; returns its name for messages, and a `datasets.Dataset`."""
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
    _check_apart(train, evaluation)
    return Source(dataset=dataset, format=known, splits=(train, evaluation), read=read)


def _check_apart(train: str, evaluation: str) -> None:
    """Refuse splits that cannot be read or that share records; `datasets` itself takes seconds to import."""
    (name, start, stop), (other, begin, end) = map(_share, (train, evaluation))
    if name == other and start < end and begin < stop:
        raise ValueError(
            f"training on {train} and evaluation on {evaluation} would share records. "
            f"Choose --train-split and --eval-split apart, or shares such as valid[:80%] and valid[80%:]."
        )


def _share(text: str) -> tuple[str, int, int]:
    """The split's name, and where the share begins and ends, in percent."""
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
    train, evaluation = (_examples(source, split) for split in source.splits)
    origin = f"{source.dataset} ({source.splits[0]}, {source.splits[1]})"
    return Task(
        format=source.format,
        train=train[: limits[0]],
        evaluation=merge_references(evaluation)[: limits[1]],
        origin=origin,
    )


def _examples(source: Source, split: str) -> tuple[Example, ...]:
    examples = []
    name, records = source.read(split)
    for number, record in enumerate(records, 1):
        try:
            examples.append(source.format.read(record))
        except ValueError as error:
            raise ValueError(f"{name}, record {number} of {split}: {error}") from error
    if not examples:
        raise ValueError(f"{name} has no record in {split}")
    return tuple(examples)


def _origin(
    dataset: str, data_dir: Path | None, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Reader]:
    """The format of a dataset, its usual splits, and how to read a split."""
    known, path = FORMATS.get(dataset), Path(dataset)
    if known is None and path.suffix in BUILDERS and path.is_file():
        return format_of_fields(path.name, *fields), ("all[:90%]", "all[90%:]"), partial(read_file, path)
    if known is None and path.suffix not in BUILDERS and (match := _ON_THE_HUB.fullmatch(dataset)):
        known = format_of_fields(dataset, *fields, hub={k: v for k, v in match.groupdict().items() if v})
        return known, known.hub_splits, partial(read_hub, known)
    if known is None:
        raise ValueError(
            f"--dataset: expected one of {', '.join(FORMATS)}, a file that exists ({', '.join(BUILDERS)}), "
            f"or owner/name on the hub, got {dataset!r}"
        )
    if any(fields):
        raise ValueError(
            f"--source-field and --target-field are for data of your own; {dataset} has its own fields"
        )
    if dataset == "demo":
        return known, known.file_splits, _generate
    if data_dir is not None:
        return known, known.file_splits, partial(read_folder, _data_folder(data_dir, dataset), dataset)
    return known, known.hub_splits, partial(read_hub, known)


def _data_folder(data_dir: Path, dataset: str) -> Path:
    folder = data_dir / dataset if (data_dir / dataset).is_dir() else data_dir
    if not folder.is_dir():
        raise ValueError(f"--data-dir: no folder {folder}")
    return folder


def _generate(split: str) -> tuple[str, Any]:
    name, start, stop = _share(split)
    if name not in DEMO_COUNTS:
        raise ValueError(f"the demo has the splits {', '.join(DEMO_COUNTS)}; got {name!r}")
    count = DEMO_COUNTS[name]
    records = summarisation_examples(name, count)  # type: ignore[arg-type]
    return f"the demo's {name} split", records[count * start // 100 : count * stop // 100]


def read_file(path: Path, split: str = "all") -> tuple[str, Any]:
    """Read a file that is one split, or a share of it.

    Fields of a `.csv` file are texts, whatever they look like. No cache is kept.

    Args:
        path: its suffix decides how it is read.
        split: the split's name, whatever it is, or a share such as `all[:90%]`.

    Returns:
        The path for messages, and a `datasets.Dataset`.

    Raises:
        ValueError: the file cannot be read, or holds no record; names the file.
    """
    import datasets  # takes seconds to import

    if path.stat().st_size == 0:
        raise ValueError(f"{path} holds no record")
    builder = BUILDERS[path.suffix]
    # a bracket in the path would be taken for a pattern
    files = {_share(split)[0]: glob.escape(str(path))}
    where: dict[str, Any] = {"data_files": files, "split": split, "keep_in_memory": True}
    try:
        with tempfile.TemporaryDirectory() as cache, _without_messages():
            table = datasets.load_dataset(builder, cache_dir=cache, **where)
            if builder == "csv":
                texts = datasets.Features({name: datasets.Value("string") for name in table.column_names})
                options = {"features": texts, "keep_default_na": False}
                table = datasets.load_dataset(builder, cache_dir=cache, **where, **options)
    except Exception as error:  # each reader behind `datasets` raises errors of its own
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} holds no record") from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error
    return str(path), table


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


def read_folder(folder: Path, dataset: str, split: str) -> tuple[str, Any]:
    """Read a split, or a share of one, from a folder with a file per split; otherwise as `read_file`.

    A file `<split>-labels.lst` in it holds one label per record; they become the field `label`.

    Raises:
        ValueError: the split is not there; the message lists the splits that are.
    """
    name, start, stop = _share(split)
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS}
    if name not in found:
        raise ValueError(
            f"{dataset} in {folder} has no {name!r} split; it has {', '.join(found) or 'none'}. "
            f"Name another with --train-split or --eval-split; a share of one is written valid[:80%]."
        )
    labels = folder / f"{name}-labels.lst"
    if not labels.exists():
        return read_file(found[name], split)
    path, table = read_file(found[name], name)
    values = labels.read_text("utf-8").split()
    if len(values) != len(table):
        raise ValueError(f"{labels} has {len(values)} labels for {len(table)} records")
    rows = range(len(table) * start // 100, len(table) * stop // 100)
    return path, table.add_column("label", list(map(int, values))).select(rows)


def read_hub(known: TaskFormat, split: str) -> tuple[str, Any]:
    """Read a split, or a share of one, from the Hugging Face hub; otherwise as `read_file`.

    Raises:
        ValueError: it could not be loaded; the message says how to use a local copy.
    """
    import datasets

    try:
        return known.hub["path"], datasets.load_dataset(**known.hub, split=split)
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
    merged: dict[Any, dict[str, None]] = {}
    for example in examples:
        merged.setdefault(example.source, {}).update(dict.fromkeys(example.references))
    return tuple(Example(source, tuple(references)) for source, references in merged.items())
