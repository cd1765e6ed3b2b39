"""The options of `gtcompile inspect`, checked before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path

from gtcompile.tools.common.known_importances import measured_importance
from gtcompile.tools.common.options import BatchShape, check_budget, check_writable, expect

DEFAULT_BUDGET = 0.5
"""The budget if none is given; a run has its own."""
ORDERS = {"cost": "dw_flops", "marginal": "marginal_flops", "importance": "importance", "size": "elements"}
"""What parameters can be sorted by, largest first; `name` keeps the order of the model."""
FORMATS = (".json", ".dot", ".graphml", ".txt")
"""Suffixes of a file that a graph can be written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to plan for."""

    budget: float | None = None
    """Share of a full step's FLOPs, in (0, 1]; None takes 0.5, or what a run trained last."""
    shape: BatchShape = field(default_factory=BatchShape)
    """Shape of the batch; a run and a factory with a batch have their own."""
    importances: Path | None = None
    """`selections.json` of a run of this model; None takes the run's own, or the number of elements."""

    def __post_init__(self) -> None:
        """Refuse a wrong budget, and a file that holds no importances.

        Raises:
            ValueError: naming the option or the file.
        """
        check_budget(self.budget)
        if self.importances is not None:
            measured_importance(self.importances)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What to print and to write."""

    only: str | None = None
    """Path segments that listed parameters must have."""
    order: str = "cost"
    """`name` or a key of `ORDERS`."""
    top: int = 12
    """Most parameters to list; 0 for all."""
    why: tuple[str, ...] = ()
    """Parameters and nodes to explain."""
    diff: tuple[str, str] | None = None
    """Two trained sets to compare."""
    html: Path | None = None
    """File for the report."""
    export: Path | None = None
    """File for the graph."""
    as_json: bool = False
    """Whether to print JSON."""

    def __post_init__(self) -> None:
        """Refuse files that cannot be written and values that make no sense.

        Raises:
            ValueError: names the option, the expected value and the given one.
        """
        expect(self.top >= 0, "top", "at least 0", self.top)
        check_order(self.order)
        if self.export is not None:
            check_format(self.export)
        for name, path in (("--html", self.html), ("--export", self.export)):
            if path is not None:
                check_writable(name, path)


def check_order(order: str) -> None:
    """Refuse an unknown order of parameters.

    Raises:
        ValueError: listing the known ones.
    """
    expect(order in ("name", *ORDERS), "sort", f"one of name, {', '.join(ORDERS)}", order)


def check_format(path: Path) -> None:
    """Refuse a file whose suffix names no known format.

    Raises:
        ValueError: the suffix is none of `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--export: expected a file ending in {', '.join(FORMATS)}, got {path}")
