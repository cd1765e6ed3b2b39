"""The paper's selection and the exact one, side by side on the true graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gtcompile import BackwardCosts, select_parameters
from gtcompile.costs.budgets import budget_flops
from gtcompile.selection.paper import chain_costs, select_by_paper


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetComparison:
    """A budget, and what each method's selection for it costs on the true graph."""

    asked: float
    """Share of a full step's FLOPs, in (0, 1]."""
    paper: float
    """Share that the published method's selection spends."""
    ours: float
    """Share that `select_parameters` spends, never above `asked`."""
    paper_importance: float
    """Importance the published method's selection reaches."""
    our_importance: float
    """Importance that `select_parameters` reaches."""

    def __str__(self) -> str:
        return (
            f"asked {self.asked:.3f}, the paper's DP spends {self.paper:.3f} for importance "
            f"{self.paper_importance:.4g}, gtcompile {self.ours:.3f} for {self.our_importance:.4g}"
        )


def compare_budgets(
    costs: BackwardCosts, importance: Mapping[str, float], budget_fraction: float
) -> BudgetComparison:
    """Select by the published method and by `select_parameters`, and cost both on the true graph.

    Args:
        costs: of the model.
        importance: FQN -> importance, of every selectable parameter.
        budget_fraction: share of a full step's FLOPs, in (0, 1].
    """
    chain = chain_costs(costs)
    indices = select_by_paper(
        chain.weight_flops,
        chain.activation_flops,
        [importance[fqn] for fqn in chain.fqns],
        budget_flops(costs.full_flops, budget_fraction) - costs.forward_flops,
    )
    paper = {chain.fqns[index] for index in indices}
    ours = select_parameters(costs, importance, budget_fraction)
    return BudgetComparison(
        asked=budget_fraction,
        paper=costs.step_flops(paper) / costs.full_flops,
        ours=ours.step_fraction,
        paper_importance=math.fsum(importance[fqn] for fqn in paper),
        our_importance=ours.importance,
    )
