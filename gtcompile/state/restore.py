"""What running a model forward and backward changes beside its weights, put back afterwards."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from gtcompile.capture.rng import random_state_kept
from gtcompile.state.parameter_records import set_requires_grad, was_trainable
from gtcompile.state.replaced_parameters import follow_names
from gtcompile.state.trained_set import train_only, trained_parameters


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Random states, buffers (batch-norm statistics) and accumulated gradients are afterwards what they were.

    Within, no parameter has a gradient. Gradients come back as the same tensor objects.
    """
    with random_state_kept(), _buffers_kept(module), _gradients_set_aside(module):
        yield


@contextlib.contextmanager
def temporarily_training(model: nn.Module, patterns: Collection[str] | None) -> Iterator[None]:
    """`train_only` for the length of a with-block, the former trained set afterwards.

    Like `train_only` it drops the gradients of what it freezes; `restored` around it keeps them.
    """
    former = trained_parameters(model)
    try:
        train_only(model, patterns)
        yield
    finally:
        train_only(model, former)


@contextlib.contextmanager
def everything_trainable(model: nn.Module) -> Iterator[None]:
    """All that was trainable when gtcompile first saw the model asks for a gradient within the block.

    That alone: the trained set, gradients and the other ranks know nothing of it.
    """
    with flags_kept(model):
        for parameter in model.parameters():
            set_requires_grad(parameter, was_trainable(parameter))
        yield


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Every parameter's `requires_grad` is afterwards what it was."""
    follow_names(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            set_requires_grad(parameter, requires_grad)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """The same tensors with the same values, whether the forward writes to buffers or replaces them."""
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
