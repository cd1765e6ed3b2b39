"""Why a parameter was selected or not: reach, importance, costs, and what would change that."""

from gtcompile.costs.budgets import smallest_budget, written_budget
from gtcompile.selection.selection import parameters_to_measure, select_parameters
from gtcompile.tools.inspect.inspection import Inspection


def selection_lines(inspection: Inspection, subject: str) -> list[str]:
    """Answer why a parameter is in the trained set or not, one fact a line; nothing if it cannot be selected.

    Args:
        inspection: has the plan.
        subject: any name of a parameter, or of something else.
    """
    fqn = inspection.costs.names.get(subject)
    if fqn is None:
        return []
    selection, costs = inspection.selection, inspection.costs
    full, alone = costs.full_flops, costs.step_flops({fqn})
    budget = selection.budget_flops / full
    if alone > selection.budget_flops:
        return [
            f"  not selected, because it is out of reach: a step that trains nothing else takes "
            f"{alone / full:.1%} of a full step's FLOPs, and the budget is {budget:.1%}",
            f"  --budget {written_budget(full, alone)} brings it within reach",
        ]
    return [*_standing(inspection, fqn), *_price(inspection, fqn), *_what_would_change(inspection, fqn)]


def _standing(inspection: Inspection, fqn: str) -> list[str]:
    """Whether it is selected, and its place among the importances."""
    selected = fqn in inspection.selection.trained
    verdict = "selected" if selected else "not selected, although the budget can train it"
    own = inspection.importance.get(fqn)
    if own is None:
        return [f"  {verdict}; its importance was not measured"]
    place = 1 + sum(value > own for value in inspection.importance.values())
    return [f"  {verdict}; its importance is {own:.4g}, number {place} of {len(inspection.importance)}"]


def _price(inspection: Inspection, fqn: str) -> list[str]:
    """FLOPs that it adds to the plan, or that the plan would save without it."""
    costs, selection = inspection.costs, inspection.selection
    marginal = costs.marginal_flops(fqn, selection.trained - {fqn})
    share = f"{marginal:.4g} FLOPs a step, {marginal / costs.full_flops:.2%} of a full step's"
    if fqn in selection.trained:
        return [f"  it adds {share}, to the other parameters of the plan"]
    left = selection.budget_flops - selection.step_flops
    fits = "which fits" if marginal <= left else f"and {left:.4g} of the budget are left"
    needed = written_budget(costs.full_flops, selection.step_flops + marginal)
    more = [] if marginal <= left else [f"  --budget {needed} would pay for it beside everything in the plan"]
    return [f"  it would add {share}, to the plan, {fits}", *more]


def _what_would_change(inspection: Inspection, fqn: str) -> list[str]:
    """Compare with the best set that decides the other way; nothing if the plan was not proven best."""
    costs, selection, importance = inspection.costs, inspection.selection, inspection.importance
    budget = smallest_budget(costs.full_flops, selection.budget_flops)
    if selection.gap != 0 or not parameters_to_measure(costs, budget) <= importance.keys():
        return []
    own = importance.get(fqn, 0.0)
    if fqn in selection.trained:
        if not parameters_to_measure(costs, budget) - {fqn}:
            return ["  no other parameter fits the budget"]
        other = select_parameters(costs, importance, budget, never=[fqn])
        lost = selection.importance - other.importance
        return [f"  the best set without it has {lost:.4g} less importance"]
    other = select_parameters(costs, importance, budget, always=[fqn])
    short = selection.importance - other.importance
    if own < 0:
        return ["  a negative importance means that training it is predicted to raise the loss"]
    wanted = f"it would be selected with an importance of {own + short:.4g}"
    return [f"  {wanted}: the best set with it lacks {short:.4g}"]
