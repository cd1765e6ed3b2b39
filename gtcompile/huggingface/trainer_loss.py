"""A trainer's own loss as a module with the model's parameters, under the model's own names."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class TrainerLoss(nn.Module):
    """Computes what `Trainer.compute_loss` computes: label smoothing, `compute_loss_func`, autocast included.

    The module shares the model's dictionaries of parameters, buffers and submodules, so names and objects are
    the same in both. Computing a loss changes nothing on the trainer: its attributes are restored, including
    the contents of dictionaries of plain values, in which some trainers count and record for their logs.

    Args:
        model: the model that is trained.
        trainer: the trainer whose loss it is.
    """

    def __init__(self, model: nn.Module, trainer: Trainer) -> None:
        super().__init__()
        shared = {name: vars(model)[name] for name in ("_parameters", "_buffers", "_modules")}
        self.__dict__.update(shared)
        self._behind = (model, trainer)  # in a tuple, so that nn.Module does not register the model again

    @torch.compiler.disable  # type: ignore[untyped-decorator] # importance is measured with eager blocks
    def forward(self, **batch: Any) -> torch.Tensor:
        """Compute the loss of one batch, a scalar; a loss per example is averaged, as the trainer does."""
        model, trainer = self._behind
        kept = {name: _copy_if_plain(value) for name, value in vars(trainer).items()}
        try:
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, dict(batch))
        finally:
            vars(trainer).clear()
            vars(trainer).update(kept)
        mean: torch.Tensor = loss.mean()
        return mean


def _copy_if_plain(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, dict) and _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, tensors, and containers of those."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)
