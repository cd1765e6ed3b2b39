"""The errors gtcompile raises, by who can act on them, and how their messages name many things."""

from collections.abc import Sequence


class GTCompileError(Exception):
    """Base of what gtcompile raises about its own work; bad arguments are `ValueError` or `TypeError`."""


class CaptureError(GTCompileError):
    """The model could not be captured as a joint graph; the message says what the user can change.

    Attributes:
        without_values: whether the weights had no values, with which it could be run.
    """

    def __init__(self, message: str, *, without_values: bool = False) -> None:
        super().__init__(message)
        self.without_values = without_values


class GraphContractError(GTCompileError):
    """A graph broke an invariant that gtcompile promises: a bug of gtcompile, not of the user."""


class BudgetError(GTCompileError):
    """The budget is smaller than any step that trains something.

    Attributes:
        minimum_budget_fraction: the smallest fraction of a full step's FLOPs that works, in (0, 1].
    """

    def __init__(self, message: str, minimum_budget_fraction: float) -> None:
        super().__init__(message)
        self.minimum_budget_fraction = minimum_budget_fraction


def some(texts: Sequence[str], between: str = ", ", most: int = 3) -> str:
    """The first of many texts, and how many more there are.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more
