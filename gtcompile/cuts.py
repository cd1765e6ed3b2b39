"""Cuts: places where the backward ends because nothing upstream is trained.

A cut tensor is a leaf that requires a gradient, so that Dynamo's guards and compiled graphs see what they
always see, and that gtcompile's regions know to compute no gradient for.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_cuts = WeakTensorKeyDictionary()


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without their history; shares memory with `tensor`."""
    leaf = tensor.detach().requires_grad_()
    _cuts[leaf] = True
    return leaf


def wants_gradient(value: object) -> bool:
    """Whether a region's backward must hand a gradient to this input."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    return value.grad_fn is not None or value not in _cuts
