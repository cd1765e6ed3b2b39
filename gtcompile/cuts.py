"""Cuts: places where the backward ends because nothing upstream is trained.

A cut tensor is a leaf that requires a gradient, so that Dynamo's guards and compiled graphs see what they
always see, and that gtcompile's regions know to compute no gradient for.
"""

import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_cuts = WeakTensorKeyDictionary()


class _Askers(threading.local):
    """Those who want tensors to ask for a gradient in this thread: models in their first forward."""

    def __init__(self) -> None:
        self.present: set[object] = set()


_askers = _Askers()


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without their history; shares memory with `tensor`."""
    leaf = tensor.detach().requires_grad_()
    _cuts[leaf] = True
    return leaf


def keep_asking(asker: object, now: bool) -> None:
    """Whether this asker wants from now on that `end` leaves tensors that ask for a gradient."""
    (_askers.present.add if now else _askers.present.discard)(asker)


def keeps_asking() -> bool:
    """Whether `end` leaves tensors that ask for a gradient: in this thread somebody wants it."""
    return bool(_askers.present)


def end(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, from which no backward runs into what computed them."""
    return ask(tensor) if keeps_asking() else tensor.detach()


def ask(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that asks for a gradient, which goes nowhere; eager code may write to it."""
    return cut(tensor).clone()


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether this is a leaf that `cut` made."""
    return tensor.grad_fn is None and tensor in _cuts
