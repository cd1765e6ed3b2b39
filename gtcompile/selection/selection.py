"""Which parameters to train: the most important that fit the budget, with the bound that proves it."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtcompile.costs.budgets import budget_flops, smallest_budget, written_budget
from gtcompile.errors import BudgetError, GTCompileError, some
from gtcompile.graph.names import match_patterns
from gtcompile.selection.knapsack import solve_knapsack

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The parameters to train until the next selection, and how good that choice is."""

    trained: frozenset[str]
    """FQNs of the parameters to train; empty when every affordable parameter has a negative importance."""
    selectable: int
    """How many parameters could have been trained."""
    step_flops: int
    """FLOPs of one training step with this selection, never above `budget_flops`."""
    budget_flops: int
    """FLOPs one training step may take."""
    full_flops: int
    """FLOPs of one training step with everything trained."""
    importance: float
    """Sum of the trained parameters' importances; where all were 0, their number."""
    importance_bound: float
    """No selection within the budget has a greater importance; equal to `importance` when proven the best."""

    @property
    def step_fraction(self) -> float:
        """Share of a full step's FLOPs that a step takes, in (0, 1]."""
        return _share(self.step_flops, self.full_flops)

    @property
    def gap(self) -> float:
        """What may be missing to the best selection, relative to the importance; 0.0 when proven the best."""
        missing = self.importance_bound - self.importance
        return missing / max(abs(self.importance_bound), abs(self.importance)) if missing else 0.0

    def __str__(self) -> str:
        budget = _share(self.budget_flops, self.full_flops)
        proof = f"at most {self.gap:.2%} below the best" if self.gap else "proven the best"
        return (
            f"{len(self.trained)} of {self.selectable} parameters, {self.step_fraction:.1%} of a full step's "
            f"FLOPs (budget {budget:.1%}), importance {self.importance:.4g}, {proof}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What a selection has to respect, checked."""

    budget_flops: int
    always: frozenset[str]
    never: frozenset[str]
    undecided: frozenset[str]
    """In neither of them, and affordable beside `always`."""


def select_parameters(
    costs: "BackwardCosts",
    importance: Mapping[str, float],
    budget_fraction: float,
    *,
    always: Iterable[str] = (),
    never: Iterable[str] = (),
    time_limit_s: float | None = None,
) -> Selection:
    """The set of parameters of greatest total importance whose training step fits the budget.

    The optimum over all sets, not an approximation: costs are exact integers, and HiGHS searches until no
    better set can exist. A parameter of negative importance is not trained unless `always` says so. A
    parameter of importance 0 is trained if that costs nothing more; if all importances are 0, they count as
    equal. With budget 1.0 and no `never` everything is trained, whatever its importance. Equal arguments give
    equal selections, in whatever order they come.

    Args:
        costs: what each set of parameters costs.
        importance: FQN -> predicted loss reduction from training it. Parameters that no selection within the
            budget can train may be left out (`parameters_to_measure` lists those that may not), and so may
            those in `always` and `never`.
        budget_fraction: share of a full step's FLOPs, forward and backward, that a step may take, in (0, 1].
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters not to train.
        time_limit_s: seconds after which the best selection found is returned with the bound proven so far;
            then equal arguments may give different selections.

    Raises:
        BudgetError: the budget is too small to train anything, or to train `always`; names the smallest that
            works.
        ValueError: a budget outside (0, 1]; an importance missing, not finite, or of no selectable parameter;
            a pattern that matches nothing; a parameter in both `always` and `never`, or every parameter in
            `never`.
    """
    terms = _check_terms(costs, budget_fraction, always, never)
    _check_importance(costs, importance, terms.undecided)
    if not any(importance[fqn] for fqn in terms.undecided):
        importance = {**importance, **dict.fromkeys(terms.undecided, 1.0)}
    if terms.budget_flops >= costs.full_flops and not terms.never:
        return _selection(costs, terms, importance, costs.fqns, 0.0)
    names = sorted(fqn for fqn in terms.undecided if importance[fqn] >= 0)
    chosen, missed = solve_knapsack(
        [importance[fqn] for fqn in names],
        _works(costs, names, terms.always),
        terms.budget_flops - costs.step_flops(terms.always),
        time_limit_s=time_limit_s,
    )
    return _selection(costs, terms, importance, terms.always | {names[index] for index in chosen}, missed)


def parameters_to_measure(
    costs: "BackwardCosts", budget_fraction: float, *, always: Iterable[str] = (), never: Iterable[str] = ()
) -> frozenset[str]:
    """The parameters whose importance decides: affordable, and not settled by `always` or `never`.

    Args:
        costs: what each set of parameters costs.
        budget_fraction: as for `select_parameters`, which needs the importance of exactly these parameters.
        always: as for `select_parameters`.
        never: as for `select_parameters`.

    Raises:
        BudgetError, ValueError: as for `select_parameters`.
    """
    return _check_terms(costs, budget_fraction, always, never).undecided


def _check_terms(
    costs: "BackwardCosts", budget_fraction: float, always: Iterable[str], never: Iterable[str]
) -> _Terms:
    budget = budget_flops(costs.full_flops, budget_fraction)
    fqns = costs.fqns
    always, never = match_patterns(costs.names, always), match_patterns(costs.names, never)
    if both := always & never:
        raise ValueError(f"{_some(both)} in both always and never; a parameter can be in one of them")
    step_flops = _step_flops_with(costs, fqns - always - never, always)
    if not always and not step_flops:
        raise ValueError("never leaves no parameter to train; expected at least one that it does not match")
    minimum = costs.step_flops(always) if always else min(step_flops.values())
    if budget < minimum:
        raise _too_small(costs, budget_fraction, minimum, always)
    undecided = frozenset(fqn for fqn, flops in step_flops.items() if flops <= budget)
    return _Terms(budget_flops=budget, always=always, never=never, undecided=undecided)


def _step_flops_with(costs: "BackwardCosts", fqns: Iterable[str], always: frozenset[str]) -> dict[str, int]:
    """Per parameter the FLOPs of a step that trains it and `always`."""
    flops = dict.fromkeys(fqns, costs.step_flops(always))
    for work in costs.shared_work:
        if work.parameters.isdisjoint(always):
            for fqn in work.parameters & flops.keys():
                flops[fqn] += work.flops
    return flops


def _too_small(
    costs: "BackwardCosts", budget_fraction: float, minimum_flops: int, always: Collection[str]
) -> BudgetError:
    """The error that names the smallest budget that works, as a number that works when it is typed back."""
    what = f"trains {_some(always)}, as asked for by always," if always else "trains anything"
    forward = costs.forward_flops / costs.full_flops
    return BudgetError(
        f"budget_fraction {budget_fraction!r} is too small: a step that {what} takes at least "
        f"{written_budget(costs.full_flops, minimum_flops)} of a full step's FLOPs, "
        f"{forward:.4f} of them in the forward",
        smallest_budget(costs.full_flops, minimum_flops),
    )


def _check_importance(
    costs: "BackwardCosts", importance: Mapping[str, float], undecided: frozenset[str]
) -> None:
    if unknown := importance.keys() - costs.fqns:
        near = difflib.get_close_matches(min(unknown), sorted(costs.fqns), n=3, cutoff=0.4)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"importance names {_some(unknown)}, not among the selectable parameters{hint}")
    if bad := [fqn for fqn, value in importance.items() if not math.isfinite(value)]:
        values = ", ".join(f"{importance[fqn]}" for fqn in sorted(bad)[:3])
        raise ValueError(f"importance of {_some(bad)} is not finite ({values}); did the loss overflow?")
    if missing := undecided - importance.keys():
        raise ValueError(f"importance is missing {_some(missing)}, which the budget could train")


def _works(costs: "BackwardCosts", names: Iterable[str], always: frozenset[str]) -> dict[int, int]:
    """FLOPs of the works that `always` leaves undone, by the names that need them (bit i for name i)."""
    bit = {name: 1 << index for index, name in enumerate(names)}
    works: dict[int, int] = {}
    for work in costs.shared_work:
        needed_by = sum(bit[name] for name in work.parameters & bit.keys())
        if needed_by and work.parameters.isdisjoint(always):
            works[needed_by] = works.get(needed_by, 0) + work.flops
    return works


def _selection(
    costs: "BackwardCosts",
    terms: _Terms,
    importance: Mapping[str, float],
    trained: frozenset[str],
    missed: float,
) -> Selection:
    step_flops = costs.step_flops(trained)
    if step_flops > terms.budget_flops:
        raise GTCompileError(f"a selection of {step_flops} FLOPs for a budget of {terms.budget_flops}")
    total = math.fsum(importance.get(fqn, 0.0) for fqn in trained)
    return Selection(
        trained=trained,
        selectable=len(costs.fqns),
        step_flops=step_flops,
        budget_flops=terms.budget_flops,
        full_flops=costs.full_flops,
        importance=total,
        importance_bound=total + missed,
    )


def _share(flops: int, full_flops: int) -> float:
    return flops / full_flops if full_flops else 1.0


def _some(names: Iterable[str]) -> str:
    return some([repr(name) for name in sorted(names)])
