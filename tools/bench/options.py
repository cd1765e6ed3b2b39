"""The options of `gtcompile bench`, checked before torch is imported."""

from dataclasses import dataclass, field
from pathlib import Path

from gtcompile.tools.common.options import BatchShape, check_counts, expect
from gtcompile.tools.runs.settings import Compiler

DTYPES = ("float32", "bfloat16")
"""Types that weights can be cast to."""
ROUNDS = 9
"""How often every step is timed by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    budgets: tuple[float, ...]
    """Shares of a full step's FLOPs, in (0, 1)."""
    shape: BatchShape = field(default_factory=BatchShape)
    """Shape of the batch, unless a factory returns its own batch."""
    compiler: Compiler | None = None
    """gtcompile's compiler; None takes `inductor` on a GPU and `eager` on a CPU. With `inductor`, blocks that
    `torch.compile` alone compiles are a baseline too."""
    rounds: int = ROUNDS
    """How often every step is timed."""
    importances: Path | None = None
    """`selections.json` of a run of this model; None draws importances at random."""
    dtype: str | None = None
    """Type of the weights, one of `DTYPES`; None takes float32, or the type that a factory returns."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: names the option, the expected value and the given one.
        """
        check_counts({"rounds": self.rounds})
        expect(self.dtype is None or self.dtype in DTYPES, "dtype", " or ".join(DTYPES), self.dtype)
        wrong = [budget for budget in self.budgets if not 0 < budget < 1]
        if wrong or not self.budgets:
            raise ValueError(
                f"--budgets: expected shares between 0 and 1, separated by commas, such as 0.4,0.5, got "
                f"{', '.join(f'{b:g}' for b in wrong) or 'none'}; everything trained is always measured"
            )
