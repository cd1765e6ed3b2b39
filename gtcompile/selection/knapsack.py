"""The knapsack of shared work: numbers in, indices out.

Items have values; a piece of work has a cost and is done once if any of its items is taken. Where all
items of work A are items of work B too, A is never done without B: inclusion is a precedence graph on the
works, and the best items within a budget are the optimum of a precedence-constrained knapsack. Sets of items
are integers here, bit i for item i.
"""

import math
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from gtcompile.errors import GTCompileError

# HiGHS takes numbers within 1e-6 of each other for equal, so values and costs are scaled far above that.
_SCALE = 2**20
_TOLERANCE = 1e-6
# Digits of the exact budget: so small that 1e-6 of error in each of a thousand variables is about 1.
_DIGIT_BITS = 10


@dataclass(frozen=True, slots=True)
class _Node:
    """What is decided together: a work, and the items that cost nothing more once it is done."""

    items: int
    """The items that need this work; a node whose items include these runs whenever this one does."""
    cost: int
    """Cost of the work itself, without what it needs done."""
    value: float
    """Sum of the values gained, in [0, 1] of all there is."""


class _Row(NamedTuple):
    """A constraint: the sum of coefficient times variable is at most the limit."""

    coefficients: dict[int, float]
    limit: float


def solve_knapsack(
    values: Sequence[float],
    works: Mapping[int, int],
    budget: int,
    *,
    time_limit_s: float | None = None,
) -> tuple[frozenset[int], float]:
    """The items of greatest total value whose works fit the budget.

    What HiGHS returns is checked in exact integers: the budget always holds. Items that cost nothing more are
    always taken, those of value 0 too. The answer depends on the arguments alone, unless a time limit ends
    the search.

    Args:
        values: finite, not negative; per item.
        works: cost (an integer, not negative) of each set of items.
        budget: what the works may cost together, not negative.
        time_limit_s: stop searching after so many seconds and return the best found.

    Returns:
        The items taken, and how much more value a better choice could have at most: 0.0 when it is proven
        that none has more (up to the solver's tolerance, 1e-6 of all values).

    Raises:
        GTCompileError: the solver failed.
    """
    total = math.fsum(values)
    nodes = _affordable(_decisions([value / total for value in values] if total else [], works), budget)
    done, bound = _solve_exactly(nodes, budget, time_limit_s)
    taken = _take(values, works, budget, {nodes[index].items for index in done})
    missed = bound - math.fsum(values[item] / total for item in taken) if total else 0.0
    return taken, missed * total if missed > _TOLERANCE else 0.0


def inclusion_pairs(sets: Sequence[int]) -> list[tuple[int, int]]:
    """The transitive reduction of set inclusion: index pairs (small, large) with no set between the two.

    Args:
        sets: distinct sets as bitmasks, ordered by size.

    >>> inclusion_pairs([0b001, 0b011, 0b101, 0b111])
    [(0, 1), (0, 2), (1, 3), (2, 3)]
    """
    pairs = []
    for small, items in enumerate(sets):
        covers: list[int] = []
        for large in range(small + 1, len(sets)):
            other = sets[large]
            if items & other == items and not any(cover & other == cover for cover in covers):
                covers.append(other)
                pairs.append((small, large))
    return pairs


def _decisions(values: Sequence[float], works: Mapping[int, int]) -> list[_Node]:
    """The works that cost something, and nodes without cost for items that need several works side by side.

    An item's node is the intersection of the works it needs: exactly those works include it.
    """
    cost = {items: cost for items, cost in works.items() if cost}
    gained: dict[int, list[float]] = {items: [] for items in cost}
    for item, value in enumerate(values):
        needed = [items for items in cost if items >> item & 1]
        if value and needed:
            gained.setdefault(reduce(and_, needed), []).append(value)
    ordered = sorted(gained, key=lambda items: (items.bit_count(), items))
    return [_Node(items, cost.get(items, 0), math.fsum(gained[items])) for items in ordered]


def _affordable(nodes: Sequence[_Node], budget: int) -> list[_Node]:
    """The nodes that fit the budget together with everything they need."""
    return [
        node
        for node in nodes
        if sum(other.cost for other in nodes if node.items & other.items == node.items) <= budget
    ]


def _solve_exactly(
    nodes: Sequence[_Node], budget: int, time_limit_s: float | None
) -> tuple[list[int], float]:
    """The best nodes that fit the budget, and an upper bound of their value.

    The solver adds costs in doubles. Should its answer be over budget in integers, the budget is written
    digit by digit, so that none is rounded. Should that fail as well, no node is returned; the bound still
    holds.
    """
    bound = math.fsum(node.value for node in nodes)
    if sum(node.cost for node in nodes) <= budget:
        return list(range(len(nodes))), bound
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    for budget_rows in (_scaled_row, _digit_rows):
        rows = [*_precedence_rows(nodes), *budget_rows([node.cost for node in nodes], budget)]
        done, solved_bound = _maximise([node.value for node in nodes], rows, deadline)
        bound = min(bound, solved_bound)
        if sum(nodes[index].cost for index in done) <= budget:
            return done, bound
    return [], bound


def _precedence_rows(nodes: Sequence[_Node]) -> list[_Row]:
    pairs = inclusion_pairs([node.items for node in nodes])
    return [_Row({small: 1.0, large: -1.0}, 0.0) for small, large in pairs]


def _scaled_row(costs: Sequence[int], budget: int) -> list[_Row]:
    """The budget in the costs' common unit where that makes small integers, else as a share of the budget."""
    unit = math.gcd(*costs)
    limit = budget // unit
    scale = min(1.0, _SCALE / limit) if limit else 1.0
    return [_Row({index: cost // unit * scale for index, cost in enumerate(costs) if cost}, limit * scale)]


def _digit_rows(costs: Sequence[int], budget: int) -> list[_Row]:
    """The budget digit by digit, lowest first, with an integer variable for the carry from each to the next.

    The costs fit the budget if and only if there are carries, none negative, with which every row holds.
    """
    base = 1 << _DIGIT_BITS
    shifts = range(0, budget.bit_length(), _DIGIT_BITS)
    rows = []
    for carry, shift in enumerate(shifts, start=len(costs)):
        row = {index: float(cost >> shift & (base - 1)) for index, cost in enumerate(costs) if cost >> shift}
        if shift:
            row[carry - 1] = 1.0
        if shift != shifts[-1]:
            row[carry] = -float(base)
        rows.append(_Row(row, float(budget >> shift & (base - 1))))
    return rows


def _maximise(
    values: Sequence[float], rows: Sequence[_Row], deadline: float | None
) -> tuple[list[int], float]:
    """One run of HiGHS: a binary per value, and an integer for every further variable in the rows.

    Returns:
        The indices of the values gained, and the bound proven.
    """
    matrix, limits = _stack(rows)
    further = matrix.shape[1] - len(values)
    gain = np.array([value * _SCALE for value in values] + [0.0] * further)
    # The nodes are all there is: HiGHS's presolve finds nothing to remove and takes longer than most
    # searches.
    options = {"mip_rel_gap": 0.0, "presolve": False}
    if deadline is not None:
        options["time_limit"] = max(deadline - time.monotonic(), 0.0)
    result = milp(
        -gain,
        constraints=LinearConstraint(matrix, ub=limits),
        bounds=Bounds(0, [1.0] * len(values) + [np.inf] * further),
        integrality=np.ones_like(gain),
        options=options,
    )
    if result.status not in (
        0,
        1,
    ):  # neither optimal nor out of time, though to do nothing is always feasible
        raise GTCompileError(f"HiGHS could not solve a selection of {len(values)} works: {result.message}")
    chosen = [] if result.x is None else np.flatnonzero(result.x[: len(values)] > 0.5).tolist()
    return chosen, math.inf if result.mip_dual_bound is None else -result.mip_dual_bound / _SCALE


def _stack(rows: Sequence[_Row]) -> tuple[csr_array, list[float]]:
    """The rows as one sparse matrix, and their limits."""
    where = [(index, variable) for index, row in enumerate(rows) for variable in row.coefficients]
    data = [coefficient for row in rows for coefficient in row.coefficients.values()]
    return csr_array((data, tuple(zip(*where, strict=True)))), [row.limit for row in rows]


def _take(values: Sequence[float], works: Mapping[int, int], budget: int, done: Set[int]) -> frozenset[int]:
    """The items for which the works `done` suffice, what still fits beside them, and what is free then."""
    costly = {items: cost for items, cost in works.items() if cost}
    needs = [[items for items in costly if items >> item & 1] for item in range(len(values))]
    taken = sum(1 << item for item, value in enumerate(values) if value and done >= set(needs[item]))

    def further_cost(item: int) -> int:
        return sum(costly[items] for items in needs[item] if not items & taken)

    spent = sum(cost for items, cost in costly.items() if items & taken)
    for item in sorted(range(len(values)), key=lambda item: -values[item]):
        if values[item] and spent + (cost := further_cost(item)) <= budget:
            spent, taken = spent + cost, taken | 1 << item
    return frozenset(item for item in range(len(values)) if not further_cost(item))
