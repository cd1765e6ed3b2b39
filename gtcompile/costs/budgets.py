"""Convert budgets: from a fraction of a full step's FLOPs to an exact number of FLOPs, and back."""

import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, get_args

BudgetOf = Literal["step", "full_finetuning"]
"""What a budget is a share of. "step": a full step of the model as it is, so with adapters, which alone are
trained, a step that trains all of them. "full_finetuning": a step that trains every floating-point parameter,
with PEFT's adapters switched off, which is what training the base model without adapters takes."""

WHOLE: dict[BudgetOf, str] = {"step": "a full step's FLOPs", "full_finetuning": "full fine-tuning's FLOPs"}
"""What a share is of, in words."""


def check_budget_of(budget_of: str) -> None:
    """Refuse an unknown `budget_of`.

    Raises:
        ValueError: lists what there is.
    """
    if budget_of not in get_args(BudgetOf):
        raise ValueError(f'expected budget_of="step" or "full_finetuning", got {budget_of!r}')


def budget_flops(full_flops: int, budget_fraction: float) -> int:
    """Return the FLOPs per training step that a budget allows.

    It is the product, rounded down. The fraction counts as the decimal that Python prints: 0.3 is 3/10.

    Args:
        full_flops: FLOPs of a full step.
        budget_fraction: fraction of these FLOPs that may be spent, in (0, 1].

    Raises:
        ValueError: `budget_fraction` is outside (0, 1].

    >>> budget_flops(10, 0.3)
    3
    """
    check_budget(budget_fraction)
    return math.floor(Fraction(repr(float(budget_fraction))) * full_flops)


def check_budget(budget_fraction: float) -> None:
    """Refuse an invalid budget.

    Raises:
        TypeError: `budget_fraction` is not a real number.
        ValueError: it is outside (0, 1].
    """
    if not isinstance(budget_fraction, Real):
        raise TypeError(f"expected a budget_fraction in (0, 1], got {budget_fraction!r}")
    if not 0 < budget_fraction <= 1:
        raise ValueError(f"expected a budget_fraction in (0, 1], got {budget_fraction!r}")


def resolved_budget(
    budget_fraction: float | None,
    budget_seconds: float | None,
    budget_memory: int | None,
    default: float | None = None,
) -> float:
    """Check the three budgets, of which at least one must be given, and return the share of FLOPs.

    Args:
        budget_fraction: share of FLOPs in (0, 1]; None if not given.
        budget_seconds: seconds of a step; None if not given.
        budget_memory: bytes beside the weights; None if not given.
        default: share of FLOPs if no budget is given; None if one must be.

    Returns:
        The given share; 1.0, which is no limit, if only other budgets are given.

    Raises:
        TypeError: a budget is of the wrong type, or none is given.
        ValueError: a budget is out of range.
    """
    if budget_seconds is not None:
        check_budget_seconds(budget_seconds)
    if budget_memory is not None:
        check_budget_memory(budget_memory)
    if budget_fraction is None:
        if budget_seconds is not None or budget_memory is not None:
            return 1.0
        if default is None:
            raise TypeError("expected a budget: budget_fraction, budget_seconds or budget_memory")
        return default
    check_budget(budget_fraction)
    return budget_fraction


def check_budget_seconds(budget_seconds: float) -> None:
    """Refuse an invalid budget of seconds.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not positive and finite.
    """
    expected = f"expected budget_seconds, the seconds of one training step, got {budget_seconds!r}"
    if isinstance(budget_seconds, bool) or not isinstance(budget_seconds, Real):
        raise TypeError(expected)
    if not 0 < budget_seconds < math.inf:
        raise ValueError(f"{expected}; it must be positive and finite")


def check_budget_memory(budget_memory: int) -> None:
    """Refuse an invalid budget of bytes.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is not positive.
    """
    expected = f"expected budget_memory as a number of bytes, such as 8 * 2**30, got {budget_memory!r}"
    if isinstance(budget_memory, bool) or not isinstance(budget_memory, Integral):
        raise TypeError(expected)
    if budget_memory <= 0:
        raise ValueError(f"{expected}; it must be positive")


def smallest_budget(full_flops: int, step_flops: int) -> float:
    """Return the smallest floating-point budget in (0, 1] that allows a step of `step_flops`.

    >>> 1 / 3, budget_flops(3, 1 / 3), smallest_budget(3, 1)
    (0.3333333333333333, 0, 0.33333333333333337)
    """
    if not full_flops:
        return 1.0
    smallest = step_flops / full_flops or math.ulp(0.0)
    while budget_flops(full_flops, smallest) < step_flops:
        smallest = math.nextafter(smallest, 1.0)
    return smallest


def written_budget(full_flops: int, step_flops: int) -> str:
    """Return the smallest budget of at most four decimals that allows a step of `step_flops`, as text.

    Rounding up keeps it valid when a user copies it from a message.

    >>> written_budget(3, 1)
    '0.3334'
    """
    ten_thousandths = math.ceil(Fraction(step_flops, full_flops or 1) * 10_000)
    return str(max(ten_thousandths, 1) / 10_000)
