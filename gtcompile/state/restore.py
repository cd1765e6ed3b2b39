"""Context managers that undo the side effects of running a model. Weights are not restored."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from gtcompile.capture.rng import random_state_kept
from gtcompile.state.parameter_records import set_requires_grad, was_trainable
from gtcompile.state.replaced_parameters import follow_names
from gtcompile.state.trained_set import set_trained, trained_parameters


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restore random states, buffers (batch-norm statistics) and accumulated gradients after the block.

    Inside the block, no parameter has a gradient at first. Gradients come back as the same tensor objects.
    """
    with random_state_kept(), _buffers_kept(module), _gradients_set_aside(module):
        yield


@contextlib.contextmanager
def temporarily_training(model: nn.Module, patterns: Collection[str] | None) -> Iterator[None]:
    """Set the trained set before the block, and restore the former trained set after it.

    Gradients of frozen parameters are dropped; wrap this in `restored` to keep them.
    """
    former = trained_parameters(model)
    try:
        set_trained(model, patterns)
        yield
    finally:
        set_trained(model, former)


@contextlib.contextmanager
def everything_trainable(model: nn.Module) -> Iterator[None]:
    """Within the block, set `requires_grad` on everything that was trainable before `train_only` was called.

    The trained set and the gradients do not change, and other ranks are not involved.
    """
    with flags_kept(model):
        for parameter in model.parameters():
            set_requires_grad(parameter, was_trainable(parameter))
        yield


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Restore every parameter's `requires_grad` after the block."""
    # first handle flags that the user has set: `set_requires_grad` below makes them look like our own
    follow_names(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            set_requires_grad(parameter, requires_grad)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the buffers after the block: both the tensor objects and their values."""
    owners = [(part, name, value) for part in module.modules() for name, value in part._buffers.items()]
    values = {tensor: tensor.detach().clone() for _, _, tensor in owners if tensor is not None}
    try:
        yield
    finally:
        for part, name, tensor in owners:
            part._buffers[name] = tensor
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)


@contextlib.contextmanager
def _gradients_set_aside(module: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
