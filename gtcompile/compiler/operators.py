"""Run an FX graph operator by operator: no code is generated but Python that calls each."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from gtcompile.passes.free_strides import free_strides
from gtcompile.torch_internals import BoxedCodeGen

Boxed = Callable[[list[Any]], Sequence[Any]]
"""From a list of inputs, which it empties, to outputs."""


def boxed(function: Boxed) -> Boxed:
    """Tell AOTAutograd that a function takes one list and empties it."""

    def call(inputs: list[Any]) -> Sequence[Any]:
        return function(inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def run_operators(module: fx.GraphModule, example_inputs: object = None) -> Boxed:
    """The graph as a function that frees every value after its last use.

    Views may become copies: some operators lay out their results in another way than when they were traced.

    Args:
        module: taken over.
        example_inputs: not needed; AOTAutograd gives a compiler both.
    """
    module = free_strides(module)
    module.graph.set_codegen(BoxedCodeGen())
    module.recompile()
    return boxed(module.forward)
