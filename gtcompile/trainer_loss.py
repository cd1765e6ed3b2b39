"""A trainer's own loss as a module with the model's parameters, under the model's own names."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer

_COUNTERS = ("_metrics", "_total_train_tokens")
"""Where TRL's trainers add up what `compute_loss` saw, for their logs."""


class TrainerLoss(nn.Module):
    """What `Trainer.compute_loss` makes of a batch: label smoothing, `compute_loss_func`, autocast and all.

    Parameters, buffers and submodules are the model's, in the same dictionaries, so names and objects are
    the same as there. What a loss records for the trainer's logs is put back.

    Args:
        model: the model that is trained.
        trainer: whose loss it is.
    """

    def __init__(self, model: nn.Module, trainer: Trainer) -> None:
        super().__init__()
        shared = {name: vars(model)[name] for name in ("_parameters", "_buffers", "_modules")}
        self.__dict__.update(shared)
        self._behind = (model, trainer)  # in a tuple, so that the model is no submodule of its own twin

    @torch.compiler.disable  # type: ignore[untyped-decorator] # blocks run eagerly here, as in all measuring
    def forward(self, **batch: Any) -> torch.Tensor:
        """The loss of one batch, a scalar."""
        model, trainer = self._behind
        kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
        try:
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, dict(batch))
        finally:
            vars(trainer).update(kept)
        mean: torch.Tensor = loss.mean()  # a loss by example counts as its mean, as for the trainer
        return mean
