"""Run an FX graph operator by operator: the only generated code is Python that calls each operator."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from gtcompile.passes.free_strides import free_strides
from gtcompile.torch_internals import BOXED_CALL, BoxedCodeGen

Boxed = Callable[[list[Any]], Sequence[Any]]
"""A function from a list of inputs, which it empties, to outputs."""


def boxed(function: Boxed) -> Boxed:
    """Mark a function as one that takes a list and empties it, as AOTAutograd expects."""

    def call(inputs: list[Any]) -> Sequence[Any]:
        return function(inputs)

    setattr(call, BOXED_CALL, True)
    return call


def run_operators(module: fx.GraphModule, example_inputs: object = None) -> Boxed:
    """Make the graph a function that frees every value after its last use.

    Views may become copies: some operators lay out their results in another way than when they were traced.

    Args:
        module: changed, and owned by the result from now on.
        example_inputs: not needed; AOTAutograd gives every compiler both.
    """
    module = free_strides(module)
    module.graph.set_codegen(BoxedCodeGen())
    module.recompile()
    return boxed(module.forward)
