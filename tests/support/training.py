"""Every way to compile a model; one training loop on it and on an eager twin frozen by `requires_grad_`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from gtcompile import compile_blocks, train_only

Choose = Callable[[Any, Iterable[str] | None], object]
"""Sets the trained parameters of a model, by exact names."""
Loop = Callable[[Any, nn.Module, Choose], Any]
"""A training loop. It takes the callable to run, the model whose parameters it updates, and how to choose the
trained set; its result is compared."""


def whole(variants: str) -> Callable[[nn.Module], Any]:
    """`torch.compile` of a whole model."""
    options = {"compiler": "eager", "variants": variants}
    return lambda model: torch.compile(model, backend="gtcompile", options=options)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "specialized": whole("specialized"),
    "hoisted": whole("hoisted"),
    "blocks": lambda model: compile_blocks(model, compiler="eager"),
}
SPECIALIZED_BLOCKS = {
    "specialized blocks": lambda model: compile_blocks(model, compiler="eager", variants="specialized")
}
"""Compiles anew for each set in each block: tried where the way matters most, for it is slow."""
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
EVERY_VARIANT = pytest.mark.parametrize(
    "way", [*WAYS.values(), *SPECIALIZED_BLOCKS.values()], ids=[*WAYS, *SPECIALIZED_BLOCKS]
)
MANY_SETS = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=pytest.mark.long if "specialized" in name else ())
        for name, way in (WAYS | SPECIALIZED_BLOCKS).items()
    ],
)
"""For loops over many sets: where each set is compiled, they are long."""
AS_A_WHOLE = pytest.mark.parametrize("way", [WAYS["specialized"], WAYS["hoisted"]], ids=list(WAYS)[:2])


def freeze_eagerly(model: nn.Module, trained: Iterable[str] | None) -> None:
    """What `train_only` must equal: `requires_grad_`, with the gradients of frozen parameters dropped."""
    names = None if trained is None else set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names is None or name in names)
        if not parameter.requires_grad:
            parameter.grad = None


def assert_same_training(
    way: Callable[[nn.Module], Any], build: Callable[[], nn.Module], loop: Loop, tolerance: float = 0.0
) -> None:
    """Check that a loop leaves the weights, gradients, buffers, random state and results of its eager twin.

    Args:
        way: compiles a model.
        build: makes the model.
        loop: trains it.
        tolerance: absolute; 0 compares bit for bit.
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
