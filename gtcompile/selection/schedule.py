"""The schedule of trained sets, one per step, whose mean cost is within the budget."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from gtcompile.costs.budgets import budget_flops

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts
    from gtcompile.selection.selection import Selection

_HALVINGS = 60
"""Steps of a bisection; more would not change how long a set is trained."""
_START = 0.5
"""Probability that a waiting set starts once enough is saved for it: at random steps, not periodically."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sets that training alternates between until the next selection."""

    sets: tuple[frozenset[str], ...]
    """FQNs of each set. Empty if the policy is called for a set at every step."""
    shallow: frozenset[str]
    """FQNs of a set within the budget, trained while FLOPs are saved for a set that costs more."""
    at_random: bool = False
    """Whether the next set is drawn at random; otherwise the sets take turns."""
    lasts: tuple[int, ...] = ()
    """For how many steps each set is trained, in order, then `shallow`; empty if sets take turns."""
    selection: "Selection | None" = None
    """The only set with its importance and bound, if the policy computed them."""
    kept_blocks: int | None = None
    """How many blocks a prefix cache keeps, in which no set trains anything; None if that was not weighed."""
    saved_flops: int = 0
    """FLOPs that this saves in the mean step; sets cost so much less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a schedule has come since the selection."""

    steps: int = 0
    """Optimizer steps so far, the one under way included."""
    spent_flops: int = 0
    """FLOPs of these steps together."""
    drawn: int = 0
    """How many sets were drawn from the plan."""
    waiting: frozenset[str] | None = None
    """A set that is drawn and not yet affordable."""


class Schedule:
    """Hands out the set for every step of a window, which begins at a selection.

    A set that costs at most the budget is trained in the step it is drawn for. A set that costs more waits:
    the plan's shallow set is trained until what the steps saved suffices, and then the waiting set, at a step
    chosen at random. So after every step the mean cost of the window is at most the budget, no drawn set is
    lost, and savings are spent.

    A plan that says how long each set lasts is followed as it is: it is within the budget at its end.

    Args:
        plan: the sets.
        costs: FLOPs of each of them.
        budget_fraction: share of `whole_flops` that a step may take on average, in (0, 1].
        seed: the same seed and selection number draw the same sets.
        number: of the selection that the window begins at.
        propose: takes the costs and a generator and returns a set; for a plan without sets.
        progress: to continue in the middle of a window.
        whole_flops: FLOPs that the budget is a share of; None for those of a full step.
    """

    def __init__(
        self,
        plan: Plan,
        costs: "BackwardCosts",
        budget_fraction: float,
        *,
        seed: int,
        number: int,
        propose: "Callable[[BackwardCosts, torch.Generator], frozenset[str]] | None" = None,
        progress: Progress | None = None,
        whole_flops: int | None = None,
    ) -> None:
        self.plan, self.costs, self.progress = plan, costs, progress or Progress()
        self.budget_fraction, self.seed, self.number = budget_fraction, seed, number
        self.whole_flops = costs.full_flops if whole_flops is None else whole_flops
        self._budget, self._propose = budget_flops(self.whole_flops, budget_fraction), propose
        self._flops_of = lru_cache(maxsize=256)(self._planned_flops)

    def _planned_flops(self, trained: frozenset[str]) -> int:
        return self.costs.step_flops(trained) - self.plan.saved_flops

    @property
    def spent_fraction(self) -> float:
        """Mean cost of the window's steps as a share of `whole_flops`, the step under way included."""
        full = self.progress.steps * self.whole_flops
        return self.progress.spent_flops / full if full else 0.0

    def fraction_of(self, trained: frozenset[str]) -> float:
        """Cost of a step that trains this set, as a share of `whole_flops`."""
        return self._flops_of(trained) / self.whole_flops

    def finished(self, whole_flops: int) -> Progress:
        """The progress without the step that was announced last, for a schedule that continues this one.

        Args:
            whole_flops: of that schedule, whose batches may have other shapes.
        """
        steps = self.progress.steps - 1
        spent = self.progress.spent_flops - self._flops_of(self._planned(steps))
        return Progress(steps=steps, spent_flops=round(spent * whole_flops / self.whole_flops))

    def charge(self, flops: int) -> None:
        """Add FLOPs that steps took beyond the plan; cheaper steps pay for them if the budget requires it."""
        self.progress = replace(self.progress, spent_flops=self.progress.spent_flops + flops)

    def next_set(self) -> frozenset[str]:
        """Return the set to train in the next step."""
        now = self.progress
        if self.plan.lasts:
            taken = self._planned(now.steps)
            spent = now.spent_flops + self._flops_of(taken)
            self.progress = Progress(steps=now.steps + 1, spent_flops=spent)
            return taken
        waiting = self._draw() if now.waiting is None else now.waiting
        starts = self._starts(waiting)
        taken = waiting if starts else self.plan.shallow
        self.progress = Progress(
            steps=now.steps + 1,
            spent_flops=now.spent_flops + self._flops_of(taken),
            drawn=now.drawn + (now.waiting is None),
            waiting=None if starts else waiting,
        )
        return taken

    def _planned(self, step: int) -> frozenset[str]:
        """The set of a step of a plan that says how long each set lasts."""
        index = bisect_right(list(accumulate(self.plan.lasts)), step)
        return self.plan.sets[index] if index < len(self.plan.sets) else self.plan.shallow

    def _starts(self, trained: frozenset[str]) -> bool:
        """Whether this step trains a set; one above the budget starts at random once it is affordable."""
        now, flops = self.progress, self._flops_of(trained)
        if now.spent_flops + flops > self._budget * (now.steps + 1):
            return False
        return flops <= self._budget or bool(torch.rand((), generator=self._generator("start")) < _START)

    def _draw(self) -> frozenset[str]:
        generator = self._generator("draw")
        if self._propose is not None:
            return self._propose(self.costs, generator)
        sets = self.plan.sets
        if self.plan.at_random:
            return sets[int(torch.randint(len(sets), (), generator=generator))]
        return sets[self.progress.drawn % len(sets)]

    def _generator(self, purpose: str) -> torch.Generator:
        return seeded(self.seed, self.number, self.progress.steps, purpose)


def steps_of_falling_cost(flops: Sequence[int], steps: int, budget: int) -> list[int]:
    """For how many steps each set is trained, if the cost of a step falls in a straight line.

    The line is `cheapest + slope * (1 - step / steps) * (full - cheapest)`, cut off at a full step's cost; a
    step trains the costliest set below it. Bisection finds the steepest line within the budget.

    Args:
        flops: of each set, ascending.
        steps: of the training.
        budget: FLOPs of all steps together; at least `steps * flops[0]`.
    """
    shares = [(each - flops[0]) / (flops[-1] - flops[0]) for each in flops[1:]]
    if not shares:
        return [steps]

    def at(slope: float) -> list[int]:
        reached = [min(max(math.floor(steps * (1 - share / slope)) + 1, 0), steps) for share in shares]
        return [more - fewer for more, fewer in pairwise([steps, *reached, 0])]

    def fits(slope: float) -> bool:
        return sum(each * count for each, count in zip(flops, at(slope), strict=True)) <= budget

    low, high = shares[0] / 2, 2.0 * steps  # all steps train the first set, or the last one
    if fits(high):
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return at(low)


def seeded(*key: object) -> torch.Generator:
    """A generator on the CPU whose numbers follow from the key alone: no state to keep or to send."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
