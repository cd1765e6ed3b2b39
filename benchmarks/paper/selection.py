"""The paper's selection and the exact one, side by side on the true graph."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gtcompile import BackwardCosts, select_parameters
from gtcompile.costs.budgets import budget_flops
from gtcompile.selection.paper import chain_costs, select_by_paper


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetComparison:
    """What a budget asked for, and what each method's selection costs on the true graph."""

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


def select_on_chain(
    weight_flops: Sequence[int], activation_flops: Sequence[int], importance: Sequence[float], budget: int
) -> tuple[int, ...]:
    """The true optimum on a chain: B_k[t] = max(B_{k-1}[t - t_dy,k], B_{k-1}[t - t_dy,k - t_dw,k] + I_k).

    B_k is kept only where it rises, so costs are exact integers of any size.

    Args:
        weight_flops: t_dw per tensor.
        activation_flops: t_dy per tensor.
        importance: per tensor.
        budget: FLOPs the backward may take.

    Returns:
        Indices of the trained tensors, ascending.
    """
    steps: list[_Choice] = [_Choice(0, 0.0, ())]
    best = steps[0]
    for k, (weight, activation, value) in enumerate(
        zip(weight_flops, activation_flops, importance, strict=True)
    ):
        passed = [_Choice(c.flops + activation, c.importance, c.trained) for c in steps]
        trained = [_Choice(c.flops + weight, c.importance + value, (*c.trained, k)) for c in passed]
        steps = _rising([choice for choice in passed + trained if choice.flops <= budget])
        best = max([best, *steps], key=lambda choice: choice.importance)
    return best.trained


@dataclass(frozen=True, slots=True)
class _Choice:
    """A set of trained tensors of a chain, with what it costs and gains."""

    flops: int
    importance: float
    trained: tuple[int, ...]


def _rising(choices: Sequence[_Choice]) -> list[_Choice]:
    """The choices that no other one beats in both cost and importance, cheapest first."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.flops, -choice.importance)):
        if not kept or choice.importance > kept[-1].importance:
            kept.append(choice)
    return kept
