"""From limits and batches to a plan: the importance that a policy needs, measured over all ranks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction
from gtcompile.distributed.ranks import Ranks
from gtcompile.importance.estimators import measure_importance
from gtcompile.selection.limits import Limits
from gtcompile.selection.policies import Policy
from gtcompile.selection.schedule import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a training decides what to train."""

    model: nn.Module
    """That is trained."""
    optimizer: Optimizer
    """The one that trains it."""
    loss_fn: LossFunction | None
    """As for `backward_costs`."""
    policy: Policy
    """Plans within limits."""
    ranks: Ranks
    """The processes that train together."""

    def plan(
        self, limits: Limits, batches: Sequence[Any], generator: torch.Generator, *, two_pass: bool
    ) -> tuple[dict[str, float], Plan]:
        """Measure importance over all ranks; return it with the plan that rank 0 makes of it.

        Args:
            limits: on what may be trained.
            batches: of this rank.
            generator: for policies that draw at random.
            two_pass: whether importance is measured within each batch.
        """
        wanted = self._wanted(limits)
        measured = self.ranks.together(lambda: self._measure(wanted, batches, two_pass=two_pass))
        importance = self.ranks.mean(measured)
        return importance, self.ranks.from_first(lambda: self.policy.plan(limits, importance, generator))

    def _wanted(self, limits: Limits) -> list[str]:
        """FQNs of the parameters whose importance the policy needs."""
        if self.policy.measured == "nothing":
            return []
        affordable = self.policy.measured == "affordable"
        return sorted(limits.to_measure if affordable else limits.trainable - limits.always)

    def _measure(self, wanted: list[str], batches: Sequence[Any], *, two_pass: bool) -> dict[str, float]:
        """Measure the importance of the wanted parameters; 0 for those that these batches did not use."""
        if not wanted:
            return {}
        logger.info("measuring the importance of %d parameters on %d batches", len(wanted), len(batches))
        measured = measure_importance(
            self.model,
            self.optimizer,
            batches,
            loss_fn=self.loss_fn,
            only=wanted,
            two_pass=two_pass,
        )
        return {fqn: measured.get(fqn, 0.0) for fqn in wanted}


def trains_nothing(plan: Plan) -> bool:
    """Whether a set of the plan is empty: every parameter in question was predicted to raise the loss."""
    return any(not trained for trained in plan.sets)


def reason(limits: Limits) -> str:
    """Why a plan trains nothing, in words."""
    return f"training any of the {len(limits.costs.fqns)} parameters is predicted to raise the loss"
