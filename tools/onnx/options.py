"""The options of `gtcompile export`, checked before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from gtcompile.tools.common.options import BatchShape, check_budget, check_writable, expect

OptimizerName = Literal["sgd", "adamw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export."""

    path: Path
    """The file to write."""
    train: tuple[str, ...] | None = None
    """Patterns of parameters to train; None without a budget trains everything, or a run's last set."""
    budget: float | None = None
    """Share of a full step's FLOPs; the importance of a parameter is its number of elements."""
    optimizer: OptimizerName | None = None
    """The optimizer whose update is part of the step."""
    dynamic: bool = False
    """Whether other batch sizes and lengths work too."""
    shape: BatchShape = field(default_factory=lambda: BatchShape(length=64, target_length=16))
    """Shape of the batch; a run and a factory with a batch have their own."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense and a file that cannot be written.

        Raises:
            ValueError: names the option, the expected value and the given one.
        """
        if self.train is not None and self.budget is not None:
            raise ValueError("expected --train or --budget, got both; leave one out")
        known = get_args(OptimizerName)
        expect(self.optimizer in (None, *known), "optimizer", " or ".join(known), self.optimizer)
        check_budget(self.budget)
        check_writable("--onnx", self.path)
