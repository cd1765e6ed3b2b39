"""A stream of gradients: each is consumed as soon as the backward completes it, and then freed."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import LossFunction, loss_of
from gtcompile.distributed.fsdp import local
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import CaptureError, GTCompileError
from gtcompile.state.host_memory import await_copy

Consumer = Callable[[str, nn.Parameter, torch.Tensor, torch.Tensor], None]
"""Takes a parameter's FQN, the parameter, its gradient, which the consumer may keep or overwrite, and whether
loss and gradient are finite: a bool tensor without dimensions, since reading it would stop the host."""


class NotFiniteError(GTCompileError):
    """A loss, gradient or update is infinite or not a number; the message says which."""

    def __init__(self, message: str, gradients: Collection[str] = ()) -> None:
        super().__init__(message)
        self.gradients = frozenset(gradients)
        """FQNs of the gradients that cannot be used."""


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

        On a GPU the host waits for nothing before the backward has been queued.

        Raises:
            NotFiniteError: the loss or a gradient is not finite. All gradients were consumed all the same.
            CaptureError: the model or `loss_fn` returned no loss.
            GTCompileError: a gradient came in several parts.
        """
        device = next(iter(self.names)).device
        # Before the forward: after it, the root of a sharded model holds whole parameters without gradients.
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            loss = batch_loss(self.module, on_device(batch, device), self.loss_fn)
        loss_is_finite = torch.isfinite(loss.detach())
        finite: dict[str, torch.Tensor] = {}

        def hand_over(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if parameter in self.names and gradient is not None:
                fqn = self.names[parameter]
                _check_whole(fqn, finite)
                await_copy(gradient, loss.device)
                finite[fqn] = loss_is_finite & _is_finite(gradient).to(loss.device)
                consume(fqn, parameter, gradient, finite[fqn].to(gradient.device))

        handles = [parameter.register_post_accumulate_grad_hook(hand_over) for parameter in trainable]
        try:
            with torch.autocast(device.type, enabled=False):  # autocast is for the forward alone
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        problems = list(_problems(loss, loss_is_finite, finite))
        self._agree_on(problems)
        if problems:
            raise problems[0]
        self.arrived |= finite.keys()

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


def _is_finite(gradient: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(local(gradient).to_dense()).all()


def _problems(
    loss: torch.Tensor, loss_is_finite: torch.Tensor, finite: Mapping[str, torch.Tensor]
) -> Iterator[NotFiniteError]:
    """The problem of a batch, if there is one; this waits for the device."""
    flags = torch.stack([loss_is_finite, *finite.values()]).tolist()
    wrong = [fqn for fqn, is_finite in zip(finite, flags[1:], strict=True) if not is_finite]
    if not flags[0]:
        yield NotFiniteError(f"the loss is {loss.item()}", wrong)
    elif wrong:
        yield NotFiniteError(f"the gradient of {wrong[0]} is not finite", wrong)


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
