"""The selection as GreenTrainer (ICLR 2024) publishes it.

The paper models a network as a chain of tensors in registration order. Training a set m costs
sum_k m_k t_dw,k + sigma(m) . t_dy, where sigma(m) marks every tensor from the output down to the deepest
trained one. It selects by dynamic programming on costs floored to 1000 levels. Three properties of the
published method differ from an exact one, and are kept here:

* Flooring makes small tensors free, so the budget is overspent. A level is a thousandth of the full backward
  here: then FLAN-T5-XL spends 0.45 and 0.58 at budgets 0.40 and 0.50; in the paper it spends 0.46 and 0.57.
* A cell of the table keeps one choice, the better of training its deepest tensor and not training it. A worse
  choice that has paid for a deeper path is lost, though it may be part of the optimum.
* The deepest tensor of all is never trained, even at budget 1.0.

All lists run from the tensor nearest the output to the deepest one; costs are FLOPs per training step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

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


def chain_costs(costs: "BackwardCosts") -> ChainCosts:
    """Approximate the true costs by the paper's chain.

    The sums over all parameters are those of the full backward. For other sets the chain is an approximation:
    a parameter pays for the path through every parameter registered after it, even in parallel branches.
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
    # In each cell, the trained tensor before tensor k: 0 for none, and -1 if tensor k is not trained.
    before = np.full((count + 1, room + 1), -1, dtype=np.int32)
    before[0] = 0
    for k in range(1, count + 1):
        best[k] = best[k - 1]
        for j in range(k):
            cost = weight[k - 1] + path[k] - path[j]
            _train_after(best, before, k, j, cost, importance[k - 1])
    return _trace(before, weight, path, room)


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
