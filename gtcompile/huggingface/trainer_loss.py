"""A trainer's own loss, as a function of the model and a batch that changes nothing on the trainer."""

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from gtcompile.huggingface.labelled_logits import add_labelled_positions, only_labelled_logits


class TrainerLoss:
    """Computes what `Trainer.compute_loss` computes, with everything that this method does.

    That is label smoothing, `compute_loss_func` and autocast, the forward of a reference model, and the loss
    of several forwards in trainers of preferences or rewards.

    Args:
        trainer: the trainer whose loss it is. It is as before after each call.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @torch.compiler.disable  # type: ignore[untyped-decorator] # importance is measured with eager blocks
    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Compute the loss of one batch, a scalar; a loss per example is averaged, as the trainer does.

        Args:
            model: the model that the trainer trains, without wrappers of parallel training.
            batch: the tensors and other values that `compute_loss` takes.
        """
        trainer = self._trainer
        with unchanged(trainer), flags_unchanged(model), trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(model, dict(batch))
        mean: torch.Tensor = loss.mean()
        return mean


@contextlib.contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Restore a trainer's attributes after the block.

    The contents of dictionaries of plain values are restored as well, and so is the trainer's state: trainers
    count and record in them what they log. Within the block, nothing is logged.
    """
    kept = {name: _copy_if_plain(value) for name, value in vars(trainer).items()}
    trainer.state = copy.copy(trainer.state)
    trainer.state.log_history = [*trainer.state.log_history]
    trainer.log = _log_nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(kept)


@contextlib.contextmanager
def flags_unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the parameters' `requires_grad` after the block.

    PEFT sets it to False to switch adapters off, as for a reference model, and to True to switch them on,
    for frozen adapters too.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def adapters_switched_safely(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Within the block, the trainer's loss and preparation of batches leave all `requires_grad` unchanged."""
    names = ("_prepare_inputs", "compute_loss")
    own = {name: value for name, value in vars(trainer).items() if name in names}
    for name in names:
        setattr(trainer, name, _with_flags_unchanged(getattr(trainer, name), model))
    try:
        yield
    finally:
        for name in names:
            delattr(trainer, name)
        vars(trainer).update(own)


@contextlib.contextmanager
def batches_noted(trainer: Trainer, note: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within the block, `note` gets every batch that the trainer computes a loss of, but for evaluations."""
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def noting(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            note({**inputs})  # a copy: trainers take labels out of the batch, and put settings in
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer.compute_loss = compute  # type: ignore[method-assign]


@contextlib.contextmanager
def labelled_logits_only_in(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Within the block, compute head and loss at labelled positions in a trainer's training steps.

    Args:
        trainer: names the positions in its training batches when it prepares them; its collator stays.
        model: the one it trains, without wrappers of parallel training.

    Raises:
        GTCompileError: the model is no causal language model of transformers.
    """
    installed, prepare = only_labelled_logits(model), trainer._prepare_inputs

    @functools.wraps(prepare)
    def with_positions(inputs: Any) -> Any:
        batch = prepare(inputs)
        return add_labelled_positions(batch) if model.training else batch

    trainer._prepare_inputs = with_positions  # type: ignore[method-assign]
    try:
        yield
    finally:
        trainer._prepare_inputs = prepare  # type: ignore[method-assign]
        installed.remove()


def _with_flags_unchanged(method: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with flags_unchanged(model):
            return method(*args, **kwargs)

    return run


def _log_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a trainer's `log`, which tells callbacks and loggers as well."""


def _copy_if_plain(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, dict) and _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, tensors, and containers of those."""
    if isinstance(value, dict | list | tuple | deque):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)
