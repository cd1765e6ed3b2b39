"""Costs of training steps, captured once for each shape of batches."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import LossFunction
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs, costs_of
from gtcompile.costs.block_costs import forward_flops_inside
from gtcompile.costs.budgets import BudgetOf
from gtcompile.costs.dependency_graph import capture_everything
from gtcompile.costs.full_finetuning import full_finetuning_flops
from gtcompile.costs.prices import SharedAmount
from gtcompile.errors import CaptureError
from gtcompile.importance.gradient_stream import batch_loss, on_device
from gtcompile.training.saved_values import compiled_parts, saved_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The costs of steps at the shapes of one batch."""

    costs: BackwardCosts
    """Of the model as it is."""
    whole_flops: int | None
    """FLOPs that the budget is a share of; None for those of a full step."""
    block_flops: tuple[int, ...] = ()
    """FLOPs of the forward of each block that a prefix cache may leave out, in order."""
    saved: tuple[SharedAmount, ...] = ()
    """Bytes saved for the backward; empty unless there is a budget of bytes."""


class CostsByShape:
    """Captures the costs of steps at a batch's shapes; keeps them until the shapes change.

    Args:
        model: whose steps they are.
        loss_fn: as for `backward_costs`.
        blocks: FQNs of the blocks that a prefix cache may leave out.
        memory: whether to compute the bytes saved for the backward.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        blocks: Sequence[str] = (),
        *,
        memory: bool = False,
    ) -> None:
        self._model, self._loss_fn, self._blocks, self._memory = model, loss_fn, blocks, memory
        self._known: dict[object, StepCosts] = {}

    def of(self, batch: Any, budget_of: BudgetOf) -> StepCosts:
        """Return the costs at this batch's shapes; capture again if these changed or costs follow values.

        Raises:
            CaptureError: the model cannot be captured.
        """
        key = budget_of, _shapes_in(batch)
        known = self._known.get(key)
        if known is None or known.costs.follows_values:
            try:
                self._known = {key: self._capture(self._moved(batch), budget_of)}
            except CaptureError:
                with torch.no_grad():  # the model's own error about a wrong batch says more
                    self.run(batch)
                raise
        return self._known[key]

    def run(self, batch: Any) -> torch.Tensor:
        """Run a forward, and return its loss."""
        return batch_loss(self._model, self._moved(batch), self._loss_fn)

    def _moved(self, batch: Any) -> Any:
        return on_device(batch, next(self._model.parameters()).device)

    def _capture(self, batch: Any, budget_of: BudgetOf) -> StepCosts:
        logger.info("capturing one training step, for its costs; once for each shape of batches")
        whole = None
        if budget_of == "full_finetuning":
            whole = full_finetuning_flops(self._model, batch, self._loss_fn)
        if not self._blocks and not self._memory:
            costs = backward_costs(self._model, batch, loss_fn=self._loss_fn)
            return StepCosts(costs=costs, whole_flops=whole)
        joint = capture_everything(self._model, batch, self._loss_fn)
        return StepCosts(
            costs=costs_of(joint),
            whole_flops=whole,
            block_flops=forward_flops_inside(joint, self._blocks),
            saved=saved_values(joint, compiled_parts(self._model)) if self._memory else (),
        )


def _shapes_in(value: Any) -> object:
    """A key of what the costs of a batch depend on: shapes and dtypes of tensors, and every other value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _shapes_in(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shapes_in(item) for item in value)
    return repr(value)
