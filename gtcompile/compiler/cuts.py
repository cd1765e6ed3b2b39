"""Cuts: places where the backward ends because nothing upstream is trained.

A cut tensor requires a gradient, so that Dynamo's guards and compiled graphs see what they always see, and
gtcompile's regions know to compute none for it. It is not a leaf, for blocks may write into their inputs.
"""

import threading
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

CUT = "_CutBackward"
"""What autograd calls the node of what `cut` returned."""
_cuts = WeakTensorKeyDictionary()


class _Askers(threading.local):
    """Those who want tensors to ask for a gradient in this thread: models in their first forward."""

    def __init__(self) -> None:
        self.present: set[object] = set()


_askers = _Askers()


class _Cut(torch.autograd.Function):
    """A leaf's values under a history that leads to the leaf, to be written into; shares its memory."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.data  # what `detach` returns could not be written into

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without their history; shares memory with `tensor`."""
    leaf = tensor.detach().requires_grad_()
    _cuts[leaf] = True
    passed: torch.Tensor = _Cut.apply(leaf)  # type: ignore[no-untyped-call]
    return passed


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
    """Whether this is what `cut` returned, as it was, or the leaf that its history leads to."""
    return tensor in _cuts if tensor.grad_fn is None else is_history_of_a_cut(tensor.grad_fn)


def is_history_of_a_cut(node: torch.autograd.graph.Node) -> bool:
    """Whether this is the node of what `cut` returned."""
    return node.name() == CUT
