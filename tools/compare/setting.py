"""What all runs of a comparison have in common, and the FLOPs of their steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.huggingface.labelled_logits import add_labelled_positions, only_labelled_logits
from gtcompile.tools.compare.arms import ARMS, Arm
from gtcompile.tools.compare.datasets import Data
from gtcompile.tools.compare.text_batches import Batch, Batches

_POSITIONS = 64
"""Labelled positions are rounded up to a multiple of this, so that nearly all batches have one shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs of a comparison have in common."""

    load: Callable[[], nn.Module]
    """Returns the pretrained model, a new copy at every call."""
    batches: Batches
    data: Data
    held_out: int
    """Number of held-out texts on which the loss is measured."""
    scored: int
    """Number of held-out texts on which the metric of the data set is measured, at the end of a run."""
    evaluations: int
    """How often a run measures the loss."""
    selections: int
    """How often a run selects, if its policy measures importance."""
    measured: int
    """Batches on which each selection measures importance."""
    bf16: bool
    """Whether forwards run under bf16 autocast."""
    compiler: str | None
    """The compiler of the blocks; None runs them eagerly."""
    save_every: int
    """Steps between two saves of an unfinished run."""
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The precision of all forwards."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def model_for(self, arm: Arm) -> nn.Module:
        """A new model that is ready for a method."""
        model = arm.prepare(self.load()).to(self.device)
        if arm.labelled:
            only_labelled_logits(model)
        return model

    def example(self, arm: Arm) -> Batch:
        """Any batch of a method: all have one shape, except for labelled positions."""
        return prepared(self.batches.batch(self.data.train[: self.batches.size]), arm)


def prepared(batch: Batch, arm: Arm) -> Batch:
    """A batch as a method wants it."""
    return add_labelled_positions(batch, multiple=_POSITIONS) if arm.labelled else batch


class Costs:
    """FLOPs of the steps of each method, captured once for all of its runs.

    Args:
        setting: of the comparison.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._known: dict[object, BackwardCosts] = {}
        self.full = self.of(ARMS["full"], setting.example(ARMS["full"]))
        """Of full fine-tuning."""

    def of(self, arm: Arm, batch: Batch, model: nn.Module | None = None) -> BackwardCosts:
        """The costs of a method's steps on batches of this shape.

        Args:
            arm: the method.
            batch: of the method.
            model: of the method; None makes one if it is needed.
        """
        key = (arm.prepare, arm.labelled, *(tensor.shape for tensor in batch.values()))
        if key not in self._known:
            self._known[key] = backward_costs(model or self._setting.model_for(arm), batch)
        return self._known[key]

    def share(self, arm: Arm) -> float:
        """A step that trains everything that the method may train, as a share of full fine-tuning's FLOPs."""
        return self.of(arm, self._setting.example(arm)).full_flops / self.full.full_flops
