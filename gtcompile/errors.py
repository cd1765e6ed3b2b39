"""The errors that gtcompile raises, and how their messages shorten long lists."""

from collections.abc import Sequence


class GTCompileError(Exception):
    """Base class of gtcompile's errors. Invalid arguments raise `ValueError` or `TypeError` instead."""


class CaptureError(GTCompileError):
    """The model could not be captured as a joint graph. The message says what the user can change.

    Attributes:
        without_values: whether the strategy that runs the model on real values was skipped, because a weight
            or the batch has no values (on the meta device, sharded). With values, capture may succeed.
    """

    def __init__(self, message: str, *, without_values: bool = False) -> None:
        super().__init__(message)
        self.without_values = without_values


class GraphContractError(GTCompileError):
    """A graph violates an invariant of gtcompile. This is a bug in gtcompile, not in user code."""


class BudgetError(GTCompileError):
    """A budget is smaller than any step that trains something.

    Attributes:
        minimum_budget_fraction: the smallest budget that works, in (0, 1]; None if another budget is too
            small.
        minimum_budget_seconds: the smallest `budget_seconds` that works; None if that is not too small.
        minimum_budget_memory: the smallest `budget_memory` that works, in bytes; None if that is not too
            small.
    """

    def __init__(
        self,
        message: str,
        minimum_budget_fraction: float | None = None,
        *,
        minimum_budget_seconds: float | None = None,
        minimum_budget_memory: int | None = None,
    ) -> None:
        super().__init__(message)
        self.minimum_budget_fraction = minimum_budget_fraction
        self.minimum_budget_seconds = minimum_budget_seconds
        self.minimum_budget_memory = minimum_budget_memory


def some(texts: Sequence[str], between: str = ", ", most: int = 3) -> str:
    """Join the first `most` texts, and say how many more there are.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more
