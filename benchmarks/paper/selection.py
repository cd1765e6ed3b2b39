"""The selection as GreenTrainer (ICLR 2024) publishes it, for comparisons; the pipeline does not use it.

The paper takes a model for a chain of tensors in registration order. Training a set m costs
sum_k m_k t_dw,k + sigma(m) . t_dy, where sigma(m) marks every tensor from the output down to the deepest
trained one. It selects by dynamic programming on costs floored to 1000 levels. Three properties of the
published method differ from an exact one, and are kept here:

* Flooring makes small tensors free, so the budget is overspent. A level is a thousandth of the full backward
  here: then FLAN-T5-XL, asked for 0.40 and 0.50, spends 0.45 and 0.58; in the paper it spends 0.46 and 0.57.
* A cell of the table keeps one choice, the better of training its deepest tensor and not training it. A worse
  choice that has paid for a deeper path is lost, though it may be part of the optimum.
* The deepest tensor of all is never trained, even at budget 1.0.

All lists run from the tensor nearest the output to the deepest one; costs are FLOPs per training step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from gtcompile.costs.backward_costs import BackwardCosts
from gtcompile.costs.budgets import budget_flops
from gtcompile.selection.selection import select_parameters

PAPER_LEVELS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCosts:
    """A model's backward as the paper sees it: a chain in reverse registration order."""

    fqns: tuple[str, ...]
    """Selectable parameters, nearest the output first."""
    weight_flops: tuple[int, ...]
    """t_dw: FLOPs of work that this parameter alone needs."""
    activation_flops: tuple[int, ...]
    """t_dy: FLOPs by which the path to the parameters so far grows with this one."""


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


def chain_costs(costs: BackwardCosts) -> ChainCosts:
    """Press the true costs into the paper's chain.

    The sums over all parameters are those of the full backward. For other sets the chain is an approximation:
    whatever registration order puts deeper is charged the whole path to it, parallel branches one after the
    other.
    """
    fqns = tuple(p.fqn for p in reversed(costs.parameters) if p.fqn in costs.fqns)
    position = {fqn: index for index, fqn in enumerate(fqns)}
    weight, activation = [0] * len(fqns), [0] * len(fqns)
    for work in costs.shared_work:
        kind = weight if len(work.parameters) == 1 else activation
        kind[min(position[fqn] for fqn in work.parameters)] += work.flops
    return ChainCosts(fqns=fqns, weight_flops=tuple(weight), activation_flops=tuple(activation))


def select_by_paper(
    weight_flops: Sequence[int],
    activation_flops: Sequence[int],
    importance: Sequence[float],
    budget: int,
    *,
    levels: int = PAPER_LEVELS,
    deepest_selectable: bool = False,
) -> tuple[int, ...]:
    """The published dynamic programming: P[k, t], the best importance among the k tensors nearest the output.

    P[k, t] = max(P[k-1, t], max_j P[j, t - t_dw,k - (t_dy,j+1 + ... + t_dy,k)] + I_k), where the cell at j
    must be one that trains tensor j. O(N^2 levels) in time.

    Args:
        weight_flops: t_dw per tensor.
        activation_flops: t_dy per tensor.
        importance: per tensor.
        budget: FLOPs the backward may take: rho T_full - T_fp.
        levels: into which the full backward is divided; costs are floored to whole ones. With as many levels
            as the backward has FLOPs nothing is rounded.
        deepest_selectable: repair the published method's range, which stops one tensor early.

    Returns:
        Indices of the trained tensors, ascending. Their true cost may exceed the budget.
    """
    backward = sum(weight_flops) + sum(activation_flops) or 1
    weight, activation = (
        [flops * levels // backward for flops in each] for each in (weight_flops, activation_flops)
    )
    room = budget * levels // backward
    count = len(importance) if deepest_selectable else len(importance) - 1
    if room < 0 or count < 1:
        return ()
    path = [0, *accumulate(activation)]
    best = np.zeros((count + 1, room + 1))
    # The tensor before in the choice of a cell: 0 for none, and -1 where tensor k is not trained.
    before = np.full((count + 1, room + 1), -1, dtype=np.int32)
    before[0] = 0
    for k in range(1, count + 1):
        best[k] = best[k - 1]
        for j in range(k):
            cost = weight[k - 1] + path[k] - path[j]
            _train_after(best, before, k, j, cost, importance[k - 1])
    return _trace(before, weight, path, room)


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


def _train_after(
    best: npt.NDArray[np.float64],
    before: npt.NDArray[np.int32],
    k: int,
    j: int,
    cost: int,
    value: float,
) -> None:
    """Fill the cells of row k in which training tensor k, next after tensor j, is the best choice so far."""
    size = best.shape[1] - cost
    if size <= 0:
        return
    gained = np.where(before[j, :size] >= 0, best[j, :size] + value, -np.inf)
    better = gained > best[k, cost:]
    best[k, cost:][better] = gained[better]
    before[k, cost:][better] = j


def _trace(
    before: npt.NDArray[np.int32], weight: Sequence[int], path: Sequence[int], room: int
) -> tuple[int, ...]:
    """The tensors of the best choice in the last row."""
    trained: list[int] = []
    k = len(before) - 1
    while k:
        j = int(before[k, room])
        if j < 0:
            k -= 1
            continue
        trained.append(k - 1)
        room -= weight[k - 1] + path[k] - path[j]
        k = j
    return tuple(reversed(trained))
