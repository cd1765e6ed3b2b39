"""A trainer's own loss as a module with the model's parameters, under the model's own names."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class TrainerLoss(nn.Module):
    """What `Trainer.compute_loss` makes of a batch: label smoothing, `compute_loss_func`, autocast and all.

    Parameters, buffers and submodules are the model's, in the same dictionaries, so names and objects are
    the same as there. The trainer's attributes are put back, dictionaries of plain values with what is in
    them: there losses count and record for logs.

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
        kept = {name: _kept(value) for name, value in vars(trainer).items()}
        try:
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, dict(batch))
        finally:
            vars(trainer).clear()
            vars(trainer).update(kept)
        mean: torch.Tensor = loss.mean()  # a loss by example counts as its mean, as for the trainer
        return mean


def _kept(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, dict) and _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)
