"""The same training loop on a compiled model and on an eager twin frozen by `requires_grad_`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from gtcompile.compiler.blocks import compile_blocks
from gtcompile.state.trained_set import train_only

Choose = Callable[[Any, Iterable[str] | None], object]
"""Sets the trained parameters of a model, by exact names."""
Loop = Callable[[Any, nn.Module, Choose], Any]
"""A training loop: what to call, the model whose parameters it updates, how to choose what is trained; what
it returns is compared."""


def whole(variants: str) -> Callable[[nn.Module], Any]:
    """`torch.compile` of a whole model."""
    options = {"compiler": "eager", "variants": variants}
    return lambda model: torch.compile(model, backend="gtcompile", options=options)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "specialized": whole("specialized"),
    "hoisted": whole("hoisted"),
    "blocks": lambda model: compile_blocks(model, compiler="eager"),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
AS_A_WHOLE = pytest.mark.parametrize("way", [WAYS["specialized"], WAYS["hoisted"]], ids=list(WAYS)[:2])


def freeze_eagerly(model: nn.Module, trained: Iterable[str] | None) -> None:
    """What `train_only` must be equal to: `requires_grad_`, and what the frozen had accumulated dropped."""
    names = None if trained is None else set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names is None or name in names)
        if not parameter.requires_grad:
            parameter.grad = None


def assert_same_training(
    way: Callable[[nn.Module], Any], build: Callable[[], nn.Module], loop: Loop, tolerance: float = 0.0
) -> None:
    """A loop leaves the same weights, gradients, buffers, random state and results behind, bit for bit.

    Args:
        way: compiles a model.
        build: makes it.
        loop: trains it.
        tolerance: absolute, where bits may differ.
    """
    left = []
    for prepare, choose in ((way, train_only), (lambda model: model, freeze_eagerly)):
        torch.manual_seed(3)
        model = build()
        torch.manual_seed(4)
        result = loop(prepare(model), model, choose)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        left.append((tensors, gradients, result, torch.get_rng_state()))
    ours, theirs = left
    assert ours[1].keys() == theirs[1].keys(), ours[1].keys() ^ theirs[1].keys()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
