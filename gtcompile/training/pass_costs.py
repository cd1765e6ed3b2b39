"""What each forward and backward of a training costs, at the shapes of its own batch."""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from gtcompile.costs.budgets import BudgetOf
from gtcompile.errors import CaptureError
from gtcompile.prefix.prefix_costs import PrefixCosts
from gtcompile.selection.schedule import Schedule
from gtcompile.training.step_costs import CostsByShape, StepCosts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """FLOPs of a forward and backward on one batch, with the trained set of the moment."""

    step_flops: int
    """If everything is computed."""
    cached_step_flops: int
    """If it starts from a prefix cache; without one, `step_flops`."""
    full_flops: int
    """If everything is trained."""
    whole_flops: int
    """Those that the budget is a share of."""
    block_flops: tuple[int, ...]
    """Of the forward of each block that a prefix cache may leave out."""


@dataclass(slots=True)
class PassTotals:
    """Adds up what the passes of a training cost."""

    known: CostsByShape
    """The costs at the shapes of batches."""
    prefix: PrefixCosts | None
    """Of the prefix cache; None without one."""
    flops: int = 0
    """Of all passes that were counted, if nothing came from a prefix cache."""
    whole: int = 0
    """The FLOPs that the budget is a share of, at the same shapes."""

    @property
    def fraction(self) -> float | None:
        """The first as a share of the second; None before the first pass."""
        return self.flops / self.whole if self.whole else None

    def costs_of(
        self, batch: Any, schedule: Schedule, trained: frozenset[str], budget_of: BudgetOf
    ) -> PassCosts:
        """Return what a pass costs; that of a mean step if this kind of batch may not be captured any more.

        Args:
            batch: of the pass.
            schedule: of the latest selection.
            trained: FQNs of what the pass trains.
            budget_of: what the budget is a share of.

        Raises:
            CaptureError: the model cannot be captured with this batch.
        """
        if not self.known.may_learn(batch):
            return self._costs(self._mean(schedule), trained)
        with self.prefix.paused() if self.prefix else contextlib.nullcontext():
            found = self.known.of(batch, budget_of)
        return self._costs(found, trained)  # a paused cache saves nothing

    def count(
        self, batch: Any, schedule: Schedule, trained: frozenset[str], budget_of: BudgetOf
    ) -> PassCosts:
        """Add a pass; one whose costs cannot be captured counts as a mean step, with a log message."""
        try:
            took = self.costs_of(batch, schedule, trained, budget_of)
        except CaptureError as error:
            logger.warning("a batch counts as a mean step, since its costs are not known: %s", error)
            took = self._costs(self._mean(schedule), trained)
        self.flops += took.step_flops
        self.whole += took.whole_flops
        if self.prefix:
            self.prefix.count(took.step_flops, took.whole_flops, took.block_flops)
        return took

    def _mean(self, schedule: Schedule) -> StepCosts:
        blocks = self.prefix.block_flops if self.prefix else ()
        return StepCosts(costs=schedule.costs, whole_flops=schedule.whole_flops, block_flops=blocks)

    def _costs(self, known: StepCosts, trained: frozenset[str]) -> PassCosts:
        step_flops = known.costs.step_flops(trained)
        cached = self.prefix.cached_step_flops(step_flops, known.block_flops) if self.prefix else step_flops
        return PassCosts(
            step_flops=step_flops,
            cached_step_flops=cached,
            full_flops=known.costs.full_flops,
            whole_flops=known.budget_whole,
            block_flops=known.block_flops,
        )
