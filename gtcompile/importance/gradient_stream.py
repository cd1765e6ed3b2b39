"""Gradients handed over one at a time as a backward completes them, and let go of."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.distributed.fsdp import local
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError

Consumer = Callable[[str, nn.Parameter, torch.Tensor], None]
"""Takes a parameter's FQN, the parameter and its gradient, which it may keep or write to."""


class NotFiniteError(GTCompileError):
    """A loss, gradient or update is infinite or not a number; the message says which."""


@dataclass(slots=True)
class GradientStream:
    """Runs batches; at no time do more gradients exist than autograd holds between two operators."""

    module: nn.Module
    """Returns its loss or an output with `.loss`."""
    names: Mapping[nn.Parameter, str]
    """The parameters whose gradients are handed over, with their FQNs; other gradients are dropped."""
    ranks: Ranks = field(default_factory=lambda: Ranks(None))
    """Those that the model is sharded over: a batch fails on all of them or on none."""
    arrived: set[str] = field(default_factory=set)
    """FQNs that had a gradient in any completed batch."""

    def run(self, batch: Mapping[str, Any], consume: Consumer) -> None:
        """Forward and backward of one batch.

        Raises:
            NotFiniteError: for the first loss or gradient that is not finite, with nothing consumed after it.
            CaptureError: the model returned no loss.
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

        asking = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(hand_over) for parameter in asking]
        try:
            self._forward_backward(batch, problems)
        finally:
            for handle in handles:
                handle.remove()
        self._agree_on(problems)
        if problems:
            raise problems[0]
        self.arrived |= seen

    def _forward_backward(self, batch: Mapping[str, Any], problems: list[NotFiniteError]) -> None:
        device = next(iter(self.names)).device
        with torch.enable_grad():
            loss = loss_of(self.module(**on_device(batch, device)))
        if not torch.isfinite(loss):
            problems.append(NotFiniteError(f"the loss is {loss.item()}"))
        self._agree_on(problems)
        with torch.autocast(device.type, enabled=False):  # autocast is for the forward alone
            loss.backward()  # in any case: after a forward, sharded modules expect one

    def _agree_on(self, problems: list[NotFiniteError]) -> None:
        """Add the first problem of any rank on all that have none."""
        said = filter(None, self.ranks.gather(str(problems[0]) if problems else None))
        if (first := next(said, None)) is not None and not problems:
            problems.append(NotFiniteError(first))


def _check_whole(fqn: str, seen: Collection[str]) -> None:
    if fqn in seen:
        raise GTCompileError(
            f"the gradient of {fqn} came in several parts, as reentrant activation checkpointing does; "
            f"checkpoint with use_reentrant=False"
        )


def _check_finite(fqn: str, gradient: torch.Tensor) -> None:
    if not torch.isfinite(local(gradient)).all():
        raise NotFiniteError(f"the gradient of {fqn} is not finite")


def on_device(value: Any, device: torch.device) -> Any:
    """A batch, or anything nested in one, with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_device(item, device) for item in value)
    return value
