"""Splits of a dataset and shares of them; parsed before torch or datasets are imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
_SLICE = re.compile(r"(?P<split>[\w.-]+)(?:\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\])?")


@dataclass(frozen=True, slots=True)
class SplitSlice:
    """A split, or a share of it such as `valid[:80%]` and `valid[80%:]`."""

    split: str
    """Name of the split."""
    start: int = 0
    """Percentage of the records before the share."""
    stop: int = 100
    """Percentage of the records at which the share ends."""

    def __str__(self) -> str:
        whole = (self.start, self.stop) == (0, 100)
        return self.split if whole else f"{self.split}[{self.start}%:{self.stop}%]"

    def __call__(self, records: Sequence[Item]) -> list[Item]:
        """The share of `records`; adjacent shares have no record in common."""
        return list(records[len(records) * self.start // 100 : len(records) * self.stop // 100])

    def overlaps(self, other: "SplitSlice") -> bool:
        """Whether some record may belong to both."""
        return self.split == other.split and self.start < other.stop and other.start < self.stop


def parse_split(text: str) -> SplitSlice:
    """Read `split`, `split[:80%]`, `split[80%:]` or `split[20%:40%]`.

    Raises:
        ValueError: `text` is not of this form, or the share is empty.

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
