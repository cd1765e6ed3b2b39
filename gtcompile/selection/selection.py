"""Select the most important parameters that fit the budget, with a bound that proves the optimum."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtcompile.costs.budgets import WHOLE, BudgetOf, resolved_budget
from gtcompile.costs.prices import NANOSECONDS, StepPrices
from gtcompile.errors import GTCompileError
from gtcompile.graph.names import near_names
from gtcompile.selection.knapsack import Capacity, knapsack_bound, solve_knapsack
from gtcompile.selection.limits import Limits, apply_terms, make_terms, quoted

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Selection:
    """The parameters to train, what a step that trains them costs, and how good the choice is."""

    trained: frozenset[str]
    """FQNs of the parameters to train; empty when every affordable parameter has a negative importance."""
    selectable: int
    """How many parameters could have been trained."""
    step_flops: int
    """FLOPs of one training step with this selection, never above `budget_flops`; of the mean step, where
    a prefix cache saves some."""
    budget_flops: int
    """FLOPs one training step may take."""
    full_flops: int
    """FLOPs of one training step with everything trained."""
    importance: float
    """Sum of the trained parameters' measured importances; if all were 0, the number of the parameters."""
    importance_bound: float | None
    """No selection within the budget has a greater importance; equal to `importance` when proven the best,
    None when the policy did not look for the best."""
    budget_of: BudgetOf = "step"
    """What the budget, and every share, is a share of."""
    full_finetuning_flops: int | None = None
    """FLOPs of one step of full fine-tuning, where the budget is a share of these."""
    step_seconds: float | None = None
    """Predicted seconds of one training step with this selection, which computes everything even where a
    prefix cache saves FLOPs; None without `budget_seconds`."""
    budget_seconds: float | None = None
    """Seconds one training step may take; None without such a budget."""
    step_bytes: int | None = None
    """Predicted bytes of training with this selection, beside the weights; None without `budget_memory`."""
    budget_memory: int | None = None
    """Bytes that training may take beside the weights; None without such a budget."""
    kept_blocks: int = 0
    """How many blocks near the input are left unchanged for a prefix cache, where selections weigh it."""
    saved_flops: int = 0
    """FLOPs that the prefix cache saves in the mean step; `step_flops` are what is left."""
    planned_epochs: int = 1
    """Epochs over which the prefix was weighed; the rest of the training."""
    planned_importance: float | None = None
    """Sum of the importances in all these epochs, if they stay the same; None if nothing was weighed."""
    planned_bound: float | None = None
    """No other choice of kept blocks and of sets has a greater such sum."""

    @property
    def whole_flops(self) -> int:
        """FLOPs that the budget is a share of."""
        return self.full_flops if self.full_finetuning_flops is None else self.full_finetuning_flops

    @property
    def step_fraction(self) -> float:
        """Share of the FLOPs that `budget_of` names that a step takes, in (0, 1]."""
        return _share(self.step_flops, self.whole_flops)

    @property
    def further_numbers(self) -> dict[str, float]:
        """Predicted seconds and bytes under the names that loggers receive, as far as there are budgets."""
        numbers = {"adaptive/step_seconds": self.step_seconds, "adaptive/step_bytes": self.step_bytes}
        return {name: float(value) for name, value in numbers.items() if value is not None}

    @property
    def gap(self) -> float | None:
        """Importance that a better selection may add, as a share of the bound; 0.0 when proven best.

        None when the policy did not look for the best. Where a prefix cache was weighed, it is that of the
        importance in all planned epochs.
        """
        found, bound = self.planned_importance, self.planned_bound
        if found is None or bound is None:
            found, bound = self.importance, self.importance_bound
        if bound is None:
            return None
        missing = bound - found
        return missing / max(abs(bound), abs(found)) if missing else 0.0

    def __repr__(self) -> str:
        return f"<Selection: {self}>"

    def __str__(self) -> str:
        budget = _share(self.budget_flops, self.whole_flops)
        text = (
            f"{len(self.trained)} of {self.selectable} parameters, {self.step_fraction:.1%} of "
            f"{WHOLE[self.budget_of]} (budget {budget:.1%})"
        )
        if self.step_seconds is not None:
            text += f", {self.step_seconds:.4g} s (budget {self.budget_seconds:.4g} s)"
        if self.step_bytes is not None and self.budget_memory is not None:
            text += f", {self.step_bytes / 1e6:,.1f} MB (budget {self.budget_memory / 1e6:,.1f} MB)"
        blocks = "1 block" if self.kept_blocks == 1 else f"{self.kept_blocks} blocks"
        if self.saved_flops:
            saved = _share(self.saved_flops, self.whole_flops)
            text += f", {saved:.1%} saved by {blocks} kept in the prefix cache"
        elif self.kept_blocks:
            text += f", {blocks} kept to fill the prefix cache"
        if self.gap is None:
            return text
        proof = f"at most {self.gap:.2%} below the best" if self.gap else "proven the best"
        text += f", importance {self.importance:.4g}"
        if self.planned_importance is not None and self.planned_epochs > 1:
            text += f" ({self.planned_importance:.4g} in {self.planned_epochs} epochs)"
        return f"{text}, {proof}"


def select_parameters(
    costs: "BackwardCosts",
    importance: Mapping[str, float],
    budget_fraction: float | None = None,
    *,
    budget_seconds: float | None = None,
    budget_memory: int | None = None,
    prices: StepPrices | None = None,
    always: Iterable[str] = (),
    never: Iterable[str] = (),
    time_limit_s: float | None = None,
) -> Selection:
    """Select the parameters of greatest total importance whose training step fits every budget.

    This is the optimum over all sets, not an approximation: costs are exact integers, and HiGHS searches
    until no better set can exist. A parameter of negative importance is not trained unless `always` names it.
    A parameter of importance 0 is trained if that costs nothing more; if all importances are 0, they count as
    equal. With budget 1.0 and no `never` everything is trained, whatever its importance. Equal arguments give
    equal selections; their order does not matter.

    Args:
        costs: what each set of parameters costs.
        importance: FQN -> predicted loss reduction from training it. Parameters that no selection within the
            budget can train may be left out (`parameters_to_measure` lists those that may not), and so may
            those in `always` and `never`.
        budget_fraction: share of a full step's FLOPs, forward and backward, that a step may take, in (0, 1];
            None for no limit, if there is another budget.
        budget_seconds: seconds that a step may take, by the prices.
        budget_memory: bytes that training may take beside the weights, by the prices.
        prices: from `step_prices`; needed for a budget in seconds or bytes.
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters not to train.
        time_limit_s: seconds after which the best selection found is returned with the bound proven so far;
            equal arguments may then give different selections.

    Raises:
        BudgetError: a budget is too small to train anything, or to train `always`; names the smallest that
            works.
        TypeError: no budget, or one of the wrong type.
        ValueError: a budget out of range, or without its prices; an importance missing, not finite, or of no
            selectable parameter; a pattern that matches nothing; a parameter in both `always` and `never`, or
            every parameter in `never`.
    """
    budgets = budget_fraction, budget_seconds, budget_memory
    limits = _limits_of(costs, budgets, prices, always, never)
    return select_within(limits, importance, time_limit_s=time_limit_s)


def parameters_to_measure(
    costs: "BackwardCosts",
    budget_fraction: float | None = None,
    *,
    budget_seconds: float | None = None,
    budget_memory: int | None = None,
    prices: StepPrices | None = None,
    always: Iterable[str] = (),
    never: Iterable[str] = (),
) -> frozenset[str]:
    """The parameters whose importance decides: affordable, and in neither `always` nor `never`.

    Arguments and errors are those of `select_parameters`, which needs the importance of exactly these
    parameters.
    """
    budgets = budget_fraction, budget_seconds, budget_memory
    return _limits_of(costs, budgets, prices, always, never).undecided


def _limits_of(
    costs: "BackwardCosts",
    budgets: tuple[float | None, float | None, int | None],
    prices: StepPrices | None,
    always: Iterable[str],
    never: Iterable[str],
) -> Limits:
    """The limits that budgets of FLOPs, seconds and bytes and two lists of patterns set."""
    share, (_, seconds, memory) = resolved_budget(*budgets), budgets
    terms = make_terms(share, always, never, budget_seconds=seconds, budget_memory=memory)
    return apply_terms(costs, terms, prices=prices)


def select_within(
    limits: Limits, importance: Mapping[str, float], *, time_limit_s: float | None = None
) -> Selection:
    """Select as `select_parameters` does, within given limits.

    Raises:
        ValueError: an importance missing, not finite, or of no selectable parameter.
    """
    check_importance(limits, importance)
    return optimum(limits, comparable(limits, importance), time_limit_s=time_limit_s)


def comparable(limits: Limits, importance: Mapping[str, float]) -> Mapping[str, float]:
    """The importances; 1 for each that decides, if all of these are 0."""
    deciding = limits.to_measure
    if any(importance[fqn] for fqn in deciding):
        return importance
    return {**importance, **dict.fromkeys(deciding, 1.0)}


def optimum(
    limits: Limits, importance: Mapping[str, float], *, time_limit_s: float | None = None
) -> Selection:
    """Return the best set within limits, for importances that were checked."""
    if everything_fits(limits):
        return describe(limits, importance, limits.costs.fqns, 0.0)
    names = _worth_training(limits, importance)
    chosen, missed = solve_knapsack(
        [importance[fqn] for fqn in names], _capacities(limits, names), time_limit_s=time_limit_s
    )
    trained = limits.always | {names[index] for index in chosen}
    _check_within(limits, trained)
    return describe(limits, importance, trained, missed)


def importance_bound(limits: Limits, importance: Mapping[str, float]) -> float:
    """Return more than the importance that `optimum` finds, in less time."""
    names = _worth_training(limits, importance)
    given = math.fsum(importance.get(fqn, 0.0) for fqn in limits.always)
    return given + knapsack_bound([importance[fqn] for fqn in names], _capacities(limits, names))


def everything_fits(limits: Limits) -> bool:
    """Whether everything may be trained, and fits the budgets."""
    fqns = limits.costs.fqns
    bounded = all(bound.price.of(fqns) <= bound.budget for bound in limits.bounds)
    return not limits.never and bounded and limits.budget_flops >= limits.costs.full_flops


def _worth_training(limits: Limits, importance: Mapping[str, float]) -> list[str]:
    return sorted(fqn for fqn in limits.undecided if importance[fqn] >= 0)


def _check_within(limits: Limits, trained: frozenset[str]) -> None:
    """Check what the solver returned.

    Raises:
        GTCompileError: a selection is over a budget, which is a bug.
    """
    if (flops := limits.costs.step_flops(trained)) > limits.budget_flops:
        raise GTCompileError(f"a selection of {flops} FLOPs for a budget of {limits.budget_flops}")
    for bound in limits.bounds:
        if (amount := bound.price.of(trained)) > bound.budget:
            raise GTCompileError(f"a selection that takes {amount} for a {bound.name} of {bound.budget}")


def describe(
    limits: Limits, importance: Mapping[str, float], trained: frozenset[str], missed: float | None
) -> Selection:
    """Make the `Selection` of a trained set.

    Args:
        limits: the budget and the costs.
        importance: by FQN, where it was measured.
        trained: FQNs.
        missed: importance that a better set could add at most; None if no better set was searched for.
    """
    total = math.fsum(importance.get(fqn, 0.0) for fqn in trained)
    bounds = {bound.name: bound for bound in limits.bounds}
    seconds, memory = bounds.get("budget_seconds"), bounds.get("budget_memory")
    return Selection(
        trained=trained,
        selectable=len(limits.costs.fqns),
        step_flops=limits.costs.step_flops(trained),
        budget_flops=limits.budget_flops,
        full_flops=limits.costs.full_flops,
        importance=total,
        importance_bound=None if missed is None else total + missed,
        budget_of=limits.budget_of,
        full_finetuning_flops=None if limits.budget_of == "step" else limits.whole_flops,
        step_seconds=None if seconds is None else seconds.price.of(trained) / NANOSECONDS,
        budget_seconds=None if seconds is None else seconds.budget / NANOSECONDS,
        step_bytes=None if memory is None else memory.price.of(trained),
        budget_memory=None if memory is None else memory.budget,
    )


def check_importance(limits: Limits, importance: Mapping[str, float]) -> None:
    """Check that the importances that decide are there.

    Raises:
        ValueError: one is missing, not finite, or of no selectable parameter.
    """
    fqns = limits.costs.fqns
    if unknown := importance.keys() - fqns:
        near = near_names(min(unknown), sorted(fqns))
        raise ValueError(f"importance names {quoted(unknown)}, not among the selectable parameters; {near}")
    if bad := [fqn for fqn, value in importance.items() if not math.isfinite(value)]:
        values = ", ".join(f"{importance[fqn]}" for fqn in sorted(bad)[:3])
        raise ValueError(f"importance of {quoted(bad)} is not finite ({values}); did the loss overflow?")
    if missing := limits.to_measure - importance.keys():
        raise ValueError(f"importance is missing {quoted(missing)}, which the budget could train")


def _capacities(limits: Limits, names: Sequence[str]) -> list[Capacity]:
    """What is left of each budget after `always`, and the shared costs by the names that need them."""
    flops = [(work.flops, work.parameters) for work in limits.costs.shared_work]
    left = limits.budget_flops - limits.costs.step_flops(limits.always)
    capacities = [Capacity(_works(flops, limits.always, names), left)]
    for bound in limits.bounds:
        shared = [(each.amount, each.parameters) for each in bound.price.shared]
        left = bound.budget - bound.price.of(limits.always)
        capacities.append(Capacity(_works(shared, limits.always, names), left))
    return capacities


def _works(
    shared: Iterable[tuple[int, frozenset[str]]], always: frozenset[str], names: Iterable[str]
) -> dict[int, int]:
    """Shared costs that `always` does not need, by the names that need them (bit i for name i)."""
    bit = {name: 1 << index for index, name in enumerate(names)}
    works: dict[int, int] = {}
    for cost, parameters in shared:
        needed_by = sum(bit[name] for name in parameters & bit.keys())
        if needed_by and parameters.isdisjoint(always):
            works[needed_by] = works.get(needed_by, 0) + cost
    return works


def _share(flops: int, full_flops: int) -> float:
    return flops / full_flops if full_flops else 1.0
