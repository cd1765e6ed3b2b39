"""Limits of a selection: the budget, and the parameters to train always or never."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from gtcompile.costs.budgets import (
    WHOLE,
    BudgetOf,
    budget_flops,
    check_budget_of,
    resolved_budget,
    smallest_budget,
    written_budget,
)
from gtcompile.costs.prices import NANOSECONDS, Price, StepPrices
from gtcompile.errors import BudgetError, some
from gtcompile.graph.names import match_patterns, refuse_string
from gtcompile.selection.cached_prefix import CachedPrefix

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

_WITHOUT_PRICES = (
    "{0} needs to know what steps take: give prices=gtcompile.step_prices(model, optimizer, batch, {1})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The limits as the user gives them, before the costs are known."""

    budget_fraction: float
    """Share of FLOPs, forward and backward, that a step may take, in (0, 1]; `budget_of` says of which."""
    budget_of: BudgetOf = "step"
    """What the budget is a share of."""
    budget_seconds: float | None = None
    """Seconds that a step may take; None for no limit."""
    budget_memory: int | None = None
    """Bytes that training may take beside the weights; None for no limit."""
    always: tuple[str, ...]
    """FQNs or shell-style patterns of parameters to train in any case."""
    never: tuple[str, ...]
    """FQNs or shell-style patterns of parameters not to train."""

    @property
    def needs_prices(self) -> bool:
        """Whether there is a budget in seconds or bytes."""
        return self.budget_seconds is not None or self.budget_memory is not None


@dataclass(frozen=True, slots=True)
class Bound:
    """A budget in seconds or bytes, with what steps take of it."""

    name: Literal["budget_seconds", "budget_memory"]
    """The argument that it is given by."""
    price: Price
    """Nanoseconds or bytes of a step."""
    budget: int
    """Nanoseconds or bytes that a step may take."""


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
    """FQNs in neither of them that the budgets can train together with `always`."""
    cheapest_flops: int
    """FLOPs of the cheapest step that trains something, and `always` with it."""
    bounds: tuple[Bound, ...] = ()
    """Budgets in seconds and bytes, which hold in addition to the FLOPs."""
    prefix: CachedPrefix | None = None
    """A prefix cache whose savings the budget may spend; None counts every step as a whole one."""

    @property
    def trainable(self) -> frozenset[str]:
        """Every FQN that may be trained, at any cost."""
        return self.costs.fqns - self.never

    @property
    def cached_prefix(self) -> CachedPrefix:
        """The prefix cache.

        Raises:
            ValueError: there is none.
        """
        if self.prefix is None:
            raise ValueError("expected limits that know a prefix cache")
        return self.prefix

    @property
    def to_measure(self) -> frozenset[str]:
        """FQNs whose importance decides: those that the budgets can train, with any blocks kept."""
        if self.prefix is None:
            return self.undecided
        each = (
            restricted(self, self.prefix.inside(kept), self.prefix.saved_flops(kept)).undecided
            for kept in range(len(self.prefix.block_flops) + 1)
        )
        return self.undecided.union(*each)


def make_terms(
    budget_fraction: float,
    always: Iterable[str],
    never: Iterable[str],
    budget_of: BudgetOf = "step",
    *,
    budget_seconds: float | None = None,
    budget_memory: int | None = None,
) -> Terms:
    """Check the arguments and return them as terms.

    Raises:
        TypeError: a single string where patterns are expected, or a budget that is no number.
        ValueError: a budget out of range, or of something unknown.
    """
    resolved_budget(budget_fraction, budget_seconds, budget_memory)
    check_budget_of(budget_of)
    refuse_string(always)
    refuse_string(never)
    return Terms(
        budget_fraction=budget_fraction,
        budget_of=budget_of,
        budget_seconds=budget_seconds,
        budget_memory=budget_memory,
        always=tuple(always),
        never=tuple(never),
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


def apply_terms(
    costs: "BackwardCosts", terms: Terms, whole_flops: int | None = None, prices: StepPrices | None = None
) -> Limits:
    """Resolve the terms for the costs of a model.

    Args:
        costs: of the model.
        terms: as the user gave them.
        whole_flops: FLOPs that the budget is a share of; None for those of a full step.
        prices: seconds and bytes of the model's steps, if there is a budget of them.

    Raises:
        BudgetError: a budget is too small to train anything, or to train `always`; names the smallest that
            works.
        ValueError: a budget out of range, or without its prices; a pattern that matches nothing; a parameter
            in both `always` and `never`, or every parameter in `never`.
    """
    whole = costs.full_flops if whole_flops is None else whole_flops
    budget = budget_flops(whole, terms.budget_fraction)
    bounds = _bounds(terms, prices)
    always, never = (match_patterns(costs.names, patterns) for patterns in (terms.always, terms.never))
    if both := always & never:
        raise ValueError(f"{quoted(both)} in both always and never; a parameter can be in one of them")
    step_flops = flops_with_each(costs, costs.fqns - always - never, always)
    if not always and not step_flops:
        raise ValueError("never leaves no parameter to train; expected at least one that it does not match")
    cheapest = costs.step_flops(always) if always else min(step_flops.values())
    if budget < cheapest:
        raise _too_small(costs, terms, whole, cheapest, always)
    affordable = frozenset(fqn for fqn, flops in step_flops.items() if flops <= budget)
    return Limits(
        costs=costs,
        budget_fraction=terms.budget_fraction,
        budget_of=terms.budget_of,
        whole_flops=whole,
        budget_flops=budget,
        always=always,
        never=never,
        undecided=_within(bounds, affordable, always, within_flops=affordable != step_flops.keys()),
        cheapest_flops=cheapest,
        bounds=bounds,
    )


def _bounds(terms: Terms, prices: StepPrices | None) -> tuple[Bound, ...]:
    """The budgets in seconds and bytes, with their prices."""
    bounds = []
    if terms.budget_seconds is not None:
        if prices is None or prices.nanoseconds is None:
            raise ValueError(_WITHOUT_PRICES.format("budget_seconds", "seconds=True"))
        nanoseconds = math.floor(Fraction(repr(float(terms.budget_seconds))) * NANOSECONDS)
        bounds.append(Bound("budget_seconds", prices.nanoseconds, nanoseconds))
    if terms.budget_memory is not None:
        if prices is None or prices.memory is None:
            raise ValueError(_WITHOUT_PRICES.format("budget_memory", "memory=True"))
        bounds.append(Bound("budget_memory", prices.memory, int(terms.budget_memory)))
    return tuple(bounds)


def _within(
    bounds: Sequence[Bound], fqns: frozenset[str], always: frozenset[str], *, within_flops: bool
) -> frozenset[str]:
    """The parameters that every bound can train together with `always`.

    Args:
        bounds: budgets in seconds and bytes.
        fqns: parameters that the budget of FLOPs can train.
        always: trained in any case.
        within_flops: whether the budget of FLOPs excludes parameters, which an error must mention.

    Raises:
        BudgetError: there is none, or a bound cannot even train `always`.
    """
    if not bounds:
        return fqns
    sets = {fqn: always | {fqn} for fqn in fqns}
    takes = {fqn: [bound.price.of(each) for bound in bounds] for fqn, each in sets.items()}
    least = [bound.price.of(always) for bound in bounds] if always else None
    for index, bound in enumerate(bounds):
        minimum = least[index] if least else min(amounts[index] for amounts in takes.values())
        if bound.budget < minimum:
            what = "within the budget of FLOPs, a step" if within_flops else "a step"
            whom = f"{quoted(always)}, as always requires," if always else "anything"
            raise _bound_error(bound, minimum, f"{what} that trains {whom} takes at least")
    budgets = [bound.budget for bound in bounds]
    fitting = frozenset(
        fqn
        for fqn, amounts in takes.items()
        if all(amount <= budget for amount, budget in zip(amounts, budgets, strict=True))
    )
    if fitting or always:
        return fitting
    raise _bounds_exclude_one_another(bounds, list(takes.values()))


def _bounds_exclude_one_another(bounds: Sequence[Bound], takes: Sequence[Sequence[int]]) -> BudgetError:
    """The error when each bound suffices alone and no parameter fits all; names the smallest raise."""

    def least(index: int) -> int:
        others = [i for i in range(len(bounds)) if i != index]
        return min(a[index] for a in takes if all(a[i] <= bounds[i].budget for i in others))

    minimum = [least(index) for index in range(len(bounds))]
    nearest = min(range(len(bounds)), key=lambda index: minimum[index] / bounds[index].budget)
    reason = "together with the other budgets, a step that trains anything takes at least"
    return _bound_error(bounds[nearest], minimum[nearest], reason)


def _bound_error(bound: Bound, minimum: int, reason: str) -> BudgetError:
    if bound.name == "budget_memory":
        return BudgetError(
            f"budget_memory {bound.budget} is too small: {reason} {minimum} bytes beside the weights",
            minimum_budget_memory=minimum,
        )
    seconds = math.ceil(minimum / 1000) / 10**6
    return BudgetError(
        f"budget_seconds {bound.budget / NANOSECONDS!r} is too small: {reason} {seconds!r} seconds",
        minimum_budget_seconds=seconds,
    )


def restricted(limits: Limits, frozen: frozenset[str], saved_flops: int) -> Limits:
    """Return limits that train nothing in some blocks, and spend what leaving these out saves.

    Args:
        limits: of steps that compute everything.
        frozen: FQNs that may not be trained either.
        saved_flops: FLOPs by which a step may cost more.
    """
    budget, given = limits.budget_flops + saved_flops, limits.always
    flops = flops_with_each(limits.costs, limits.trainable - given - frozen, given)
    undecided = frozenset(
        fqn
        for fqn, each in flops.items()
        if each <= budget and all(bound.price.of(given | {fqn}) <= bound.budget for bound in limits.bounds)
    )
    return replace(limits, budget_flops=budget, never=limits.never | frozen, undecided=undecided)


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
