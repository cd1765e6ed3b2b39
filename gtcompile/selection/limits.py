"""Limits of a selection: the budget, and the parameters to train always or never."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtcompile.costs.budgets import (
    WHOLE,
    BudgetOf,
    budget_flops,
    check_budget,
    check_budget_of,
    smallest_budget,
    written_budget,
)
from gtcompile.errors import BudgetError, some
from gtcompile.graph.names import match_patterns, refuse_string

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The limits as the user gives them, before the costs are known."""

    budget_fraction: float
    """Share of FLOPs, forward and backward, that a step may take, in (0, 1]; `budget_of` says of which."""
    budget_of: BudgetOf = "step"
    """What the budget is a share of."""
    always: tuple[str, ...]
    """FQNs or shell-style patterns of parameters to train in any case."""
    never: tuple[str, ...]
    """FQNs or shell-style patterns of parameters not to train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The terms of a selection, applied to the costs of a model."""

    costs: "BackwardCosts"
    """What each set of parameters costs."""
    budget_fraction: float
    """As in `Terms`."""
    budget_of: BudgetOf
    """As in `Terms`."""
    whole_flops: int
    """FLOPs that the budget is a share of."""
    budget_flops: int
    """FLOPs one training step may take."""
    always: frozenset[str]
    """FQNs to train in any case."""
    never: frozenset[str]
    """FQNs not to train."""
    undecided: frozenset[str]
    """FQNs in neither of them that the budget can train together with `always`."""
    cheapest_flops: int
    """FLOPs of the cheapest step that trains something, and `always` with it."""

    @property
    def trainable(self) -> frozenset[str]:
        """Every FQN that may be trained, at any cost."""
        return self.costs.fqns - self.never


def make_terms(
    budget_fraction: float, always: Iterable[str], never: Iterable[str], budget_of: BudgetOf = "step"
) -> Terms:
    """Check the arguments and return them as terms.

    Raises:
        TypeError: a single string where patterns are expected, or a budget that is no number.
        ValueError: a budget outside (0, 1], or of something unknown.
    """
    check_budget(budget_fraction)
    check_budget_of(budget_of)
    refuse_string(always)
    refuse_string(never)
    return Terms(
        budget_fraction=budget_fraction, budget_of=budget_of, always=tuple(always), never=tuple(never)
    )


def check_patterns(terms: Terms, names: dict[str, str]) -> None:
    """Check that every pattern of the terms matches a name.

    Args:
        terms: has the patterns.
        names: from every name of a parameter, tied names included, to its FQN.

    Raises:
        ValueError: a pattern matches nothing; names the nearest names.
    """
    match_patterns(names, terms.always)
    match_patterns(names, terms.never)


def apply_terms(costs: "BackwardCosts", terms: Terms, whole_flops: int | None = None) -> Limits:
    """Resolve the terms for the costs of a model.

    Args:
        costs: of the model.
        terms: as the user gave them.
        whole_flops: FLOPs that the budget is a share of; None for those of a full step.

    Raises:
        BudgetError: the budget is too small to train anything, or to train `always`; names the smallest that
            works.
        ValueError: a budget outside (0, 1]; a pattern that matches nothing; a parameter in both `always` and
            `never`, or every parameter in `never`.
    """
    whole = costs.full_flops if whole_flops is None else whole_flops
    budget = budget_flops(whole, terms.budget_fraction)
    always, never = (match_patterns(costs.names, patterns) for patterns in (terms.always, terms.never))
    if both := always & never:
        raise ValueError(f"{quoted(both)} in both always and never; a parameter can be in one of them")
    step_flops = flops_with_each(costs, costs.fqns - always - never, always)
    if not always and not step_flops:
        raise ValueError("never leaves no parameter to train; expected at least one that it does not match")
    cheapest = costs.step_flops(always) if always else min(step_flops.values())
    if budget < cheapest:
        raise _too_small(costs, terms, whole, cheapest, always)
    return Limits(
        costs=costs,
        budget_fraction=terms.budget_fraction,
        budget_of=terms.budget_of,
        whole_flops=whole,
        budget_flops=budget,
        always=always,
        never=never,
        undecided=frozenset(fqn for fqn, flops in step_flops.items() if flops <= budget),
        cheapest_flops=cheapest,
    )


def step_budget_fraction(costs: "BackwardCosts", terms: Terms, whole_flops: int) -> float:
    """The budget as a share of a full step's FLOPs, in (0, 1], whatever it is given as a share of."""
    if terms.budget_of == "step":
        return terms.budget_fraction
    return min(1.0, budget_flops(whole_flops, terms.budget_fraction) / costs.full_flops)


def flops_with_each(costs: "BackwardCosts", fqns: Iterable[str], given: frozenset[str]) -> dict[str, int]:
    """By FQN, the FLOPs of a step that trains the parameter together with `given`."""
    flops = dict.fromkeys(fqns, costs.step_flops(given))
    for work in costs.shared_work:
        if work.parameters.isdisjoint(given):
            for fqn in work.parameters & flops.keys():
                flops[fqn] += work.flops
    return flops


def quoted(names: Iterable[str]) -> str:
    """Quote the first few names for an error message."""
    return some([repr(name) for name in sorted(names)])


def _too_small(
    costs: "BackwardCosts", terms: Terms, whole_flops: int, minimum_flops: int, always: Collection[str]
) -> BudgetError:
    """The error that names the smallest budget that works, as a number that works when it is typed back."""
    what = f"trains {quoted(always)}, as always requires," if always else "trains anything"
    whole, forward = WHOLE[terms.budget_of], costs.forward_flops / whole_flops
    if minimum_flops > whole_flops:
        return BudgetError(
            f"no budget of {whole} is enough: a step that {what} takes {minimum_flops / whole_flops:.4f} of "
            f'them; use budget_of="step"',
            1.0,
        )
    return BudgetError(
        f"budget_fraction {terms.budget_fraction!r} is too small: a step that {what} takes at least "
        f"{written_budget(whole_flops, minimum_flops)} of {whole}, {forward:.4f} of them in the forward",
        smallest_budget(whole_flops, minimum_flops),
    )
