"""Why a parameter was selected or not: reach, importance, costs, and what would change that."""

from dataclasses import dataclass

from gtcompile.costs.budgets import smallest_budget, written_budget
from gtcompile.selection.selection import Selection, parameters_to_measure, select_parameters
from gtcompile.tools.inspect.inspection import Inspection


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The standing of one parameter in a plan. FLOPs are those of a training step."""

    parameter: str
    """Its FQN."""
    selected: bool
    """Whether the plan trains it."""
    alone_flops: int
    """FLOPs of a step that trains nothing else."""
    within_reach: bool
    """Whether the budget pays for such a step. If not, and if it is not selected, only `budget` follows."""
    importance: float | None = None
    """Its importance; None if it was not measured."""
    place: int | None = None
    """Its place among the measured importances, from 1 on; None if it was not measured."""
    marginal_flops: int | None = None
    """FLOPs that it adds to the other parameters of the plan."""
    left_flops: int | None = None
    """FLOPs of the budget that the plan leaves."""
    budget: float | None = None
    """The smallest budget, to four decimals, that would pay for it: alone if it is out of reach, else beside
    everything in the plan; None if this budget does."""
    another_fits: bool | None = None
    """Whether the budget can train anything else; None if the plan is not proven the best."""
    importance_of_other_plan: float | None = None
    """Importance of the best set that decides the other way; None if there is none, or no proof."""
    importance_needed: float | None = None
    """The importance above which it would be selected; None if it is selected, or no proof."""


def standing(inspection: Inspection, subject: str) -> Standing | None:
    """Find out why a parameter is in the trained set or not; None if `subject` cannot be selected.

    Args:
        inspection: has the plan.
        subject: any name of a parameter, or of something else.
    """
    fqn = inspection.costs.names.get(subject)
    if fqn is None:
        return None
    selection, costs, own = inspection.selection, inspection.costs, inspection.importance.get(fqn)
    selected, full, alone = fqn in selection.trained, costs.full_flops, costs.step_flops({fqn})
    within_reach = alone <= selection.budget_flops
    if not within_reach and not selected:  # a policy that keeps to the budget in the mean may select it
        return Standing(
            parameter=fqn,
            selected=False,
            alone_flops=alone,
            within_reach=False,
            budget=float(written_budget(full, alone)),
        )
    marginal = costs.marginal_flops(fqn, selection.trained - {fqn})
    left = selection.budget_flops - selection.step_flops
    short = not selected and marginal > left
    another_fits, other = _other_plan(inspection, fqn)
    return Standing(
        parameter=fqn,
        selected=selected,
        alone_flops=alone,
        within_reach=within_reach,
        importance=own,
        place=None if own is None else 1 + sum(value > own for value in inspection.importance.values()),
        marginal_flops=marginal,
        left_flops=left,
        budget=float(written_budget(full, selection.step_flops + marginal)) if short else None,
        another_fits=another_fits,
        importance_of_other_plan=None if other is None else other.importance,
        importance_needed=(
            None
            if selected or other is None or own is None
            else own + selection.importance - other.importance
        ),
    )


def _other_plan(inspection: Inspection, fqn: str) -> tuple[bool | None, Selection | None]:
    """Whether anything else fits, and the best plan that decides the other way; None without a proof."""
    costs, selection, importance = inspection.costs, inspection.selection, inspection.importance
    budget = smallest_budget(costs.full_flops, selection.budget_flops)
    affordable = parameters_to_measure(costs, budget)
    if selection.gap != 0 or not affordable <= importance.keys():
        return None, None
    if fqn not in selection.trained:
        return True, select_parameters(costs, importance, budget, always=[fqn])
    if not affordable - {fqn}:
        return False, None
    return True, select_parameters(costs, importance, budget, never=[fqn])


def selection_lines(inspection: Inspection, subject: str) -> list[str]:
    """Answer why a parameter is in the trained set or not, one fact a line; nothing if it cannot be selected.

    Args:
        inspection: has the plan.
        subject: any name of a parameter, or of something else.
    """
    found, full = standing(inspection, subject), inspection.costs.full_flops
    if found is None:
        return []
    if not found.within_reach and not found.selected:
        return [
            f"  not selected, because it is out of reach: a step that trains nothing else takes "
            f"{found.alone_flops / full:.1%} of a full step's FLOPs, and the budget is "
            f"{inspection.selection.budget_flops / full:.1%}",
            f"  --budget {found.budget} brings it within reach",
        ]
    return [_verdict(found, len(inspection.importance)), *_price(found, full), *_change(found, inspection)]


def _verdict(found: Standing, measured: int) -> str:
    """Whether it is selected, and its place among the importances."""
    verdict = "selected" if found.selected else "not selected, although the budget can train it"
    if found.importance is None:
        return f"  {verdict}; its importance was not measured"
    return f"  {verdict}; its importance is {found.importance:.4g}, number {found.place} of {measured}"


def _price(found: Standing, full: int) -> list[str]:
    """FLOPs that it adds to the plan, or that the plan would save without it."""
    marginal, left = found.marginal_flops or 0, found.left_flops or 0
    share = f"{marginal:.4g} FLOPs a step, {marginal / full:.2%} of a full step's"
    if found.selected:
        return [f"  it adds {share}, to the other parameters of the plan"]
    fits = "which fits" if marginal <= left else f"and {left:.4g} of the budget are left"
    more = [f"  --budget {found.budget} would pay for it beside everything in the plan"]
    return [f"  it would add {share}, to the plan, {fits}", *(more if found.budget is not None else [])]


def _change(found: Standing, inspection: Inspection) -> list[str]:
    """Compare with the best set that decides the other way; nothing if the plan was not proven best."""
    if found.another_fits is None:
        return []
    if found.importance_of_other_plan is None:
        return ["  no other parameter fits the budget"]
    lost = inspection.selection.importance - found.importance_of_other_plan
    if found.selected:
        return [f"  the best set without it has {lost:.4g} less importance"]
    if (found.importance or 0.0) < 0:
        return ["  a negative importance means that training it is predicted to raise the loss"]
    wanted = f"it would be selected with an importance of {found.importance_needed:.4g}"
    return [f"  {wanted}: the best set with it lacks {lost:.4g}"]
