"""The knapsack of shared work: numbers in, indices out.

Items have values. A piece of work has a cost, and is done once if any item that needs it is taken. If every
item that needs work A needs work B too, A is never done without B. So set inclusion is a precedence graph on
the works, and the best items within a budget are the optimum of a precedence-constrained knapsack. With
several budgets, a work has a cost in each (FLOPs, seconds, bytes), and each budget is one more constraint of
the same integer programme. Sets of items are integers here: bit i stands for item i.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import NamedTuple

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from gtcompile.errors import GTCompileError

# HiGHS treats numbers within 1e-6 of each other as equal, so values and costs are scaled far above that.
_SCALE = 2**20
_TOLERANCE = 1e-6
_MOST_COVERS = 200
"""How many answers that rounding put over budget are excluded before the search gives up."""


class Capacity(NamedTuple):
    """One budget, and what the works cost of it."""

    works: Mapping[int, int]
    """Cost (an integer, not negative) of each set of items; a set may be missing."""
    budget: int
    """What the works may cost together, not negative."""


Costs = tuple[int, ...]
"""Cost of a work in each budget."""


@dataclass(frozen=True, slots=True)
class _Node:
    """One decision: do a work, and take the items that cost nothing more once it is done."""

    items: int
    """The items that need this work; a node whose items include these runs whenever this one does."""
    costs: Costs
    """Costs of the work itself, without the works it depends on."""
    value: float
    """Sum of the values gained, as a share in [0, 1] of all values."""


class _Row(NamedTuple):
    """A constraint: the sum of coefficient times variable is at most the limit."""

    coefficients: dict[int, float]
    limit: float


def solve_knapsack(
    values: Sequence[float],
    capacities: Sequence[Capacity],
    *,
    time_limit_s: float | None = None,
) -> tuple[frozenset[int], float]:
    """Find the items of greatest total value whose works fit every budget.

    The answer of HiGHS is checked in exact integers, so the budgets always hold. Items that cost nothing more
    are always taken, even those of value 0. The answer depends on the arguments alone, unless a time limit
    ends the search.

    Args:
        values: finite, not negative; one per item.
        capacities: at least one.
        time_limit_s: stop searching after this many seconds and return the best answer found.

    Returns:
        The items taken, and how much more value a better choice could have at most: 0.0 if it is proven that
        there is none (up to the solver's tolerance, 1e-6 of all values).

    Raises:
        GTCompileError: the solver failed.
    """
    total = math.fsum(values)
    works, budgets = _joined(capacities), [capacity.budget for capacity in capacities]
    nodes = _affordable(_decisions([value / total for value in values] if total else [], works), budgets)
    done, bound = _solve_exactly(nodes, budgets, time_limit_s)
    taken = _take(values, works, budgets, {nodes[index].items for index in done})
    missed = bound - math.fsum(values[item] / total for item in taken) if total else 0.0
    return taken, missed * total if missed > _TOLERANCE else 0.0


def knapsack_bound(values: Sequence[float], capacities: Sequence[Capacity]) -> float:
    """Return more value than `solve_knapsack` can find, in less time: works may be done in part.

    Args:
        values: finite, not negative; one per item.
        capacities: at least one.

    Raises:
        GTCompileError: the solver failed.
    """
    total = math.fsum(values)
    if not total:
        return 0.0
    works, budgets = _joined(capacities), [capacity.budget for capacity in capacities]
    free = math.fsum(v for item, v in enumerate(values) if not any(items >> item & 1 for items in works))
    nodes = _affordable(_decisions([value / total for value in values], works), budgets)
    if _fits(_total([node.costs for node in nodes], budgets), budgets):
        return free + total * math.fsum(node.value for node in nodes)
    columns = [[node.costs[row] for node in nodes] for row in range(len(budgets))]
    rows = [_budget_row(costs, budget) for costs, budget in zip(columns, budgets, strict=True) if any(costs)]
    _, bound = _maximise([node.value for node in nodes], [*_precedence_rows(nodes), *rows], whole=False)
    return free + total * bound


def _joined(capacities: Sequence[Capacity]) -> dict[int, Costs]:
    """The costs of each work that costs anything, in the order in which the capacities name them."""
    sets = dict.fromkeys(items for capacity in capacities for items, cost in capacity.works.items() if cost)
    return {items: tuple(capacity.works.get(items, 0) for capacity in capacities) for items in sets}


def _total(costs: Iterable[Costs], budgets: Sequence[int]) -> Costs:
    """The sum of costs, in each budget."""
    return tuple(map(sum, zip(*costs, strict=True))) or (0,) * len(budgets)


def _fits(costs: Costs, budgets: Sequence[int]) -> bool:
    return all(cost <= budget for cost, budget in zip(costs, budgets, strict=True))


def inclusion_pairs(sets: Sequence[int]) -> list[tuple[int, int]]:
    """The transitive reduction of set inclusion: index pairs (small, large) with no set in between.

    Args:
        sets: distinct sets as bitmasks, ordered by size.

    >>> inclusion_pairs([0b001, 0b011, 0b101, 0b111])
    [(0, 1), (0, 2), (1, 3), (2, 3)]
    """
    inclusion: nx.DiGraph[int] = nx.DiGraph()
    inclusion.add_nodes_from(range(len(sets)))
    inclusion.add_edges_from(
        (small, large)
        for small, items in enumerate(sets)
        for large in range(small + 1, len(sets))
        if items & sets[large] == items
    )
    return sorted(nx.transitive_reduction(inclusion).edges)


def _decisions(values: Sequence[float], works: Mapping[int, Costs]) -> list[_Node]:
    """The works that cost something, and nodes without cost for items that need several unrelated works.

    An item's node is the intersection of the works it needs: exactly those works include it.
    """
    gained: dict[int, list[float]] = {items: [] for items in works}
    for item, value in enumerate(values):
        needed = [items for items in works if items >> item & 1]
        if value and needed:
            gained.setdefault(reduce(and_, needed), []).append(value)
    ordered = sorted(gained, key=lambda items: (items.bit_count(), items))
    free = tuple(0 for _ in next(iter(works.values()), ()))
    return [_Node(items, works.get(items, free), math.fsum(gained[items])) for items in ordered]


def _affordable(nodes: Sequence[_Node], budgets: Sequence[int]) -> list[_Node]:
    """The nodes that fit the budgets together with everything they need."""

    def needs(node: _Node) -> Costs:
        needed = (other.costs for other in nodes if node.items & other.items == node.items)
        return _total(needed, budgets)

    return [node for node in nodes if _fits(needs(node), budgets)]


def _solve_exactly(
    nodes: Sequence[_Node], budgets: Sequence[int], time_limit_s: float | None
) -> tuple[list[int], float]:
    """The best nodes that fit the budgets, and an upper bound of their value.

    The solver adds costs as doubles, so its answer may be over a budget by the last few units. Such an answer
    contains a cover: nodes of which at least one must be left out. Excluding the cover and solving again
    removes no affordable answer. If the covers run out, no node is returned; the bound still holds.
    """
    bound = math.fsum(node.value for node in nodes)
    totals = _total([node.costs for node in nodes], budgets)
    if _fits(totals, budgets):
        return list(range(len(nodes))), bound
    columns = [[node.costs[row] for node in nodes] for row in range(len(budgets))]
    tight = [(columns[row], budgets[row]) for row, total in enumerate(totals) if total > budgets[row]]
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    rows = [*_precedence_rows(nodes), *(_budget_row(costs, budget) for costs, budget in tight)]
    for _ in range(_MOST_COVERS):
        done, solved_bound = _maximise([node.value for node in nodes], rows, deadline)
        bound = min(bound, solved_bound)
        covers = [
            _cover_row(costs, done, budget)
            for costs, budget in tight
            if sum(costs[index] for index in done) > budget
        ]
        if not covers:
            return done, bound
        rows += covers
    return [], bound


def _precedence_rows(nodes: Sequence[_Node]) -> list[_Row]:
    pairs = inclusion_pairs([node.items for node in nodes])
    return [_Row({small: 1.0, large: -1.0}, 0.0) for small, large in pairs]


def _budget_row(costs: Sequence[int], budget: int) -> _Row:
    """The budget in the costs' common unit if that makes small integers, else as a share of the budget."""
    unit = math.gcd(*costs)
    limit = budget // unit
    scale = min(1.0, _SCALE / limit) if limit else 1.0
    return _Row({index: cost // unit * scale for index, cost in enumerate(costs) if cost}, limit * scale)


def _cover_row(costs: Sequence[int], done: Sequence[int], budget: int) -> _Row:
    """Exclude nodes that are over budget together: the costliest of them, as few as that takes."""
    cover: list[int] = []
    spent = 0
    for index in sorted(done, key=lambda index: -costs[index]):
        if spent > budget:
            break
        cover.append(index)
        spent += costs[index]
    return _Row(dict.fromkeys(cover, 1.0), len(cover) - 1.0)


def _maximise(
    values: Sequence[float], rows: Sequence[_Row], deadline: float | None = None, *, whole: bool = True
) -> tuple[list[int], float]:
    """Run HiGHS once, with a variable per value: 0 or 1, or anything between them unless `whole`.

    Returns:
        The indices of the values gained, and the bound proven.
    """
    matrix, limits = _stack(rows, len(values))
    # HiGHS's presolve finds nothing to remove here and takes longer than most searches.
    options = {"mip_rel_gap": 0.0, "presolve": False}
    if deadline is not None:
        options["time_limit"] = max(deadline - time.monotonic(), 0.0)
    result = milp(
        -np.array(values) * _SCALE,
        constraints=LinearConstraint(matrix, ub=limits),
        bounds=Bounds(0, 1),
        integrality=np.full(len(values), int(whole)),
        options=options,
    )
    optimal, out_of_time = 0, 1
    if result.status not in (optimal, out_of_time):  # infeasible is impossible: doing nothing fits
        raise GTCompileError(f"HiGHS could not solve a selection of {len(values)} works: {result.message}")
    chosen = [] if result.x is None else np.flatnonzero(result.x > 0.5).tolist()
    bound = result.mip_dual_bound if whole else result.fun
    return chosen, math.inf if bound is None else -bound / _SCALE


def _stack(rows: Sequence[_Row], variables: int) -> tuple[csr_array, list[float]]:
    """The rows as one sparse matrix, and their limits."""
    where = [(index, variable) for index, row in enumerate(rows) for variable in row.coefficients]
    data = [coefficient for row in rows for coefficient in row.coefficients.values()]
    shape = (len(rows), variables)
    return csr_array((data, tuple(zip(*where, strict=True))), shape=shape), [row.limit for row in rows]


def _take(
    values: Sequence[float], works: Mapping[int, Costs], budgets: Sequence[int], done: Set[int]
) -> frozenset[int]:
    """The items whose works are all in `done`, then those that still fit the budgets, then those now free."""
    needs = [[items for items in works if items >> item & 1] for item in range(len(values))]
    taken = sum(1 << item for item, value in enumerate(values) if value and done >= set(needs[item]))

    def further_costs(item: int) -> Costs:
        return _total((works[items] for items in needs[item] if not items & taken), budgets)

    spent = _total((costs for items, costs in works.items() if items & taken), budgets)
    for item in sorted(range(len(values)), key=lambda item: -values[item]):
        if values[item] and _fits(costs := _total((spent, further_costs(item)), budgets), budgets):
            spent, taken = costs, taken | 1 << item
    return frozenset(item for item in range(len(values)) if not any(further_costs(item)))
