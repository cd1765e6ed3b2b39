"""Load the two splits of a dataset: the examples to learn from and those to answer afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtcompile.tools.data.formats import FORMATS, Example, TaskFormat, read_fields, summarisation
from gtcompile.tools.data.readers import (
    SUFFIXES,
    Record,
    numbered,
    parse_split,
    read_file,
    read_folder,
    read_hub,
)
from gtcompile.tools.models.demo_data import summarisation_examples

DEMO_COUNTS = {"train": 1024, "test": 128}
"""Examples of the demo's splits; both are generated, so any number could be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A dataset ready to be tokenized."""

    format: TaskFormat
    """Prompt, metric and lengths."""
    train: tuple[Example, ...]
    """Learned from, in the order of the data."""
    evaluation: tuple[Example, ...]
    """Answered after training; shares no record with `train`."""
    origin: str
    """Where the examples come from, for the report."""

    def __str__(self) -> str:
        return f"{self.origin}: {len(self.train)} training examples, {len(self.evaluation)} for evaluation"


def load_task(
    dataset: str,
    *,
    data_dir: Path | None = None,
    splits: tuple[str | None, str | None] = (None, None),
    fields: tuple[str | None, str | None] = (None, None),
    limits: tuple[int | None, int | None] = (None, None),
) -> Task:
    """Load a dataset by name, or a file of your own.

    Args:
        dataset: one of `FORMATS`, or the path of a `.jsonl`, `.json` or `.csv` file.
        data_dir: folder with the authors' files, or a folder of such folders; None loads from the hub.
        splits: training and evaluation split, or shares of one such as `valid[:80%]`; None takes the usual.
        fields: source and target field of such a file; None takes `source` and `target`.
        limits: at most this many training and evaluation examples, the first of each split; None takes all.

    Raises:
        ValueError: the data is not there, lacks a field, or the splits share records.
    """
    known, defaults, read = _origin(dataset, data_dir, fields)
    chosen = tuple(parse_split(given or default) for given, default in zip(splits, defaults, strict=True))
    if chosen[0].overlaps(chosen[1]):
        raise ValueError(
            f"training on {chosen[0]} and evaluation on {chosen[1]} would share records. "
            f"Choose --train-split and --eval-split apart, or shares such as valid[:80%] and valid[80%:]."
        )
    train, evaluation = (tuple(numbered(known.read, share(read(share.split)))) for share in chosen)
    evaluation = merge_references(evaluation)
    for share, examples in zip(chosen, (train, evaluation), strict=True):
        if not examples:
            raise ValueError(f"{dataset} has no record in {share}")
    origin = f"{dataset} ({chosen[0]}, {chosen[1]})"
    return Task(format=known, train=train[: limits[0]], evaluation=evaluation[: limits[1]], origin=origin)


def _origin(
    dataset: str, data_dir: Path | None, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Callable[[str], list[Record]]]:
    """The format of a dataset, its usual splits, and how a split is read."""
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
        return known, known.file_splits, lambda split: read_folder(data_dir, split, dataset=dataset)
    return known, known.hub_splits, lambda split: read_hub(split, load_arguments=known.hub)


def _own_file(
    dataset: str, fields: tuple[str | None, str | None]
) -> tuple[TaskFormat, tuple[str, str], Callable[[str], list[Record]]]:
    path = Path(dataset)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ValueError(
            f"expected one of {', '.join(FORMATS)} or a file that exists ({', '.join(SUFFIXES)}) as dataset, "
            f"got {dataset!r}"
        )
    source, target = fields[0] or "source", fields[1] or "target"
    known = summarisation(path.name, lambda record: read_fields(record, source, target), 64)
    records = read_file(path)
    if not records:
        raise ValueError(f"{path} holds no record")
    return known, ("all[:90%]", "all[90%:]"), lambda split: _only_split(records, split)


def _only_split(records: list[Record], split: str) -> list[Record]:
    if split != "all":
        raise ValueError(f"a file has one split, all; got {split!r}. A share of it is written all[:90%].")
    return records


def _generate(split: str) -> list[Record]:
    if split not in DEMO_COUNTS:
        raise ValueError(f"the demo has the splits {', '.join(DEMO_COUNTS)}; got {split!r}")
    return list(summarisation_examples(split, DEMO_COUNTS[split]))  # type: ignore[arg-type]


def merge_references(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Examples with the same source as one, with all their references; the order of first appearance.

    >>> merge_references([Example("a", ("x",)), Example("b", ("y",)), Example("a", ("z",))])
    (Example(source='a', references=('x', 'z')), Example(source='b', references=('y',)))
    """
    merged: dict[str, dict[str, None]] = {}
    for example in examples:
        merged.setdefault(example.source, {}).update(dict.fromkeys(example.references))
    return tuple(Example(source, tuple(references)) for source, references in merged.items())
