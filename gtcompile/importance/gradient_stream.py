"""A stream of gradients: each is consumed as soon as the backward completes it, and then freed."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import LossFunction, loss_of
from gtcompile.distributed.fsdp import local
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import CaptureError, GTCompileError

Consumer = Callable[[str, nn.Parameter, torch.Tensor], None]
"""Takes a parameter's FQN, the parameter and its gradient, which the consumer may keep or overwrite."""


class NotFiniteError(GTCompileError):
    """A loss, gradient or update is infinite or not a number; the message says which."""


@dataclass(slots=True)
class GradientStream:
    """Runs batches and hands over each gradient as soon as it is complete, so that few exist at a time."""

    module: nn.Module
    """Returns its loss or an output with `.loss`, unless `loss_fn` computes the loss."""
    names: Mapping[nn.Parameter, str]
    """FQNs by parameter, for the gradients to hand over; other gradients are dropped."""
    ranks: Ranks = field(default_factory=lambda: Ranks(None))
    """The ranks that the model is sharded over: a batch fails on all of them or on none."""
    loss_fn: LossFunction | None = None
    """Computes the loss from the module and a batch; None for a module that returns it."""
    arrived: set[str] = field(default_factory=set)
    """FQNs that had a gradient in any completed batch."""

    def run(self, batch: Any, consume: Consumer) -> None:
        """Run the forward and the backward of one batch.

        Raises:
            NotFiniteError: the loss or a gradient is not finite; nothing is consumed after the first one.
            CaptureError: the model or `loss_fn` returned no loss.
            GTCompileError: a gradient came in several parts.
        """
        seen: set[str] = set()
        problems: list[NotFiniteError] = []

        def hand_over(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if parameter in self.names and gradient is not None and not problems:
                fqn = self.names[parameter]
                _check_whole(fqn, seen)
                seen.add(fqn)
                try:
                    _check_finite(fqn, gradient)
                    consume(fqn, parameter, gradient)
                except NotFiniteError as problem:
                    problems.append(problem)

        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(hand_over) for parameter in trainable]
        try:
            self._forward_backward(batch, problems)
        finally:
            for handle in handles:
                handle.remove()
        self._agree_on(problems)
        if problems:
            raise problems[0]
        self.arrived |= seen

    def _forward_backward(self, batch: Any, problems: list[NotFiniteError]) -> None:
        device = next(iter(self.names)).device
        with torch.enable_grad():
            loss = batch_loss(self.module, on_device(batch, device), self.loss_fn)
        if not torch.isfinite(loss):
            problems.append(NotFiniteError(f"the loss is {loss.item()}"))
        self._agree_on(problems)
        with torch.autocast(device.type, enabled=False):  # autocast is for the forward alone
            loss.backward()  # even after a loss that is not finite: sharded modules expect a backward

    def _agree_on(self, problems: list[NotFiniteError]) -> None:
        """Add the first problem of any rank to `problems` on the ranks that have none."""
        messages = filter(None, self.ranks.gather(str(problems[0]) if problems else None))
        if (first := next(messages, None)) is not None and not problems:
            problems.append(NotFiniteError(first))


def _check_whole(fqn: str, seen: Collection[str]) -> None:
    if fqn in seen:
        raise GTCompileError(
            f"the gradient of {fqn} came in several parts, as reentrant activation checkpointing does; "
            f"checkpoint with use_reentrant=False"
        )


def _check_finite(fqn: str, gradient: torch.Tensor) -> None:
    if not torch.isfinite(local(gradient).to_dense()).all():
        raise NotFiniteError(f"the gradient of {fqn} is not finite")


def batch_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> torch.Tensor:
    """Compute the scalar loss of a batch on the model's device.

    Args:
        model: returns its loss or an output with `.loss`, unless `loss_fn` computes the loss.
        batch: the keyword dictionary of the model's forward; with `loss_fn` anything.
        loss_fn: takes the model and the batch.

    Raises:
        CaptureError: there is no scalar loss.
    """
    if loss_fn is None:
        return loss_of(model(**batch))
    loss = loss_fn(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise CaptureError(f"expected loss_fn(model, batch) to return a scalar tensor, got {got}")
    return loss.reshape(())


def on_device(value: Any, device: torch.device) -> Any:
    """Copy a batch of any nesting with its tensors moved to the device; the batch itself is not changed."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_device(item, device) for item in value))
    if type(value) in (list, tuple):
        return type(value)(on_device(item, device) for item in value)
    if hasattr(value, "to"):  # such as transformers' BatchEncoding, which moves in place
        return copy.copy(value).to(device)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    return value
