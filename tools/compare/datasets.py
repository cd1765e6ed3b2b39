"""The data sets: which texts are trained on, and which are held out. This module imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gtcompile.tools.common.options import DEMO
from gtcompile.tools.data.formats import FORMATS, PIQA_SOLUTIONS, Example, TaskFormat
from gtcompile.tools.data.tasks import (
    Source,
    examples_of,
    find_source,
    folder_of,
    merge_references,
    splits_in,
)


@dataclass(frozen=True, slots=True)
class Splits:
    """What the texts of a comparison come from: splits, or shares of one such as `dev[:80%]`."""

    train: str
    search: str
    """Held out; learning rates are chosen by the loss on it."""
    test: str
    """Held out; results are measured on it."""
    note: str = ""
    """Why these are not the authors' own splits; empty if they are."""

    def __str__(self) -> str:
        text = f"trained on {self.train}, learning rates chosen on {self.search}, measured on {self.test}"
        return f"{text} ({self.note})" if self.note else text

    @property
    def names(self) -> frozenset[str]:
        """The splits without shares."""
        return frozenset(share.partition("[")[0] for share in (self.train, self.search, self.test))


FILES: Mapping[str, tuple[Splits, ...]] = {
    "scitldr": (Splits("train", "dev", "test"),),
    "dialogsum": (
        Splits("train", "dev", "test"),
        Splits("dev[:80%]", "dev[80%:]", "test", "there is no train split, so dev is divided"),
    ),
    "piqa": (
        Splits("train[:90%]", "train[90%:]", "valid"),
        Splits("valid[:60%]", "valid[60%:70%]", "valid[70%:]", "there is only valid, so it is divided"),
    ),
    "webquestions": (Splits("trainmodel", "val", "test"),),
    DEMO: (Splits("train", "validation", "test"),),
}
"""The splits of the authors' files. Of several choices, the first whose files are there is taken."""
HUB: Mapping[str, Splits] = {
    "scitldr": Splits("train", "validation", "test"),
    "dialogsum": Splits("train", "validation", "test"),
    "piqa": Splits("train[:90%]", "train[90%:]", "validation"),
    "webquestions": Splits("train[:90%]", "train[90%:]", "test"),
}
"""The splits on the hub."""

_FORMATS: Mapping[str, TaskFormat] = {
    **FORMATS,
    # The losses in docs/measurements.md were measured with the space as a token of the prompt.
    "scitldr": replace(FORMATS["scitldr"], cue=" TL;DR: ", joint=""),
    "piqa": PIQA_SOLUTIONS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Texts to train on and two held-out sets."""

    format: TaskFormat
    """The prompt and the metric."""
    splits: Splits
    """What the texts come from."""
    train: tuple[Example, ...]
    search: tuple[Example, ...]
    test: tuple[Example, ...]

    def __str__(self) -> str:
        counts = f"{len(self.train)}, {len(self.search)} and {len(self.test)} texts"
        return f"{self.format.name}: {self.splits}; {counts}"


def find_data(dataset: str, data_dir: Path | None) -> tuple[Source, Splits]:
    """Find a data set and its splits without reading it.

    Args:
        dataset: a name in `FILES`.
        data_dir: folder with the authors' files, or a folder of such folders; None for the hub and the demo.

    Raises:
        ValueError: there is no such folder, or it lacks files.
    """
    source = replace(find_source(dataset, data_dir=data_dir), format=_FORMATS[dataset])
    if dataset == DEMO:
        return source, FILES[DEMO][0]
    if data_dir is None:
        return source, HUB[dataset]
    folder = folder_of(dataset, data_dir)
    found = splits_in(folder).keys()
    fitting = [splits for splits in FILES[dataset] if splits.names <= found]
    if not fitting:
        expected = " or ".join(", ".join(sorted(splits.names)) for splits in FILES[dataset])
        raise ValueError(
            f"--data-dir: {folder} lacks files of {dataset}: expected one for each of {expected} (such as "
            f"test.jsonl), found {', '.join(found) or 'none'}"
        )
    return source, fitting[0]


def read_data(source: Source, splits: Splits) -> Data:
    """Read the texts.

    Raises:
        ValueError: they cannot be read, or lack a field; names the file and the record.
    """
    train, search, test = (examples_of(source, share) for share in (splits.train, splits.search, splits.test))
    return Data(
        format=source.format,
        splits=splits,
        train=train,
        search=merge_references(search),
        test=merge_references(test),
    )
