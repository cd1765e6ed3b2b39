"""Leave out of a backward graph what depends on zero tangents only."""

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import fx

from gtcompile.passes.contract import graph_pass

aten = torch.ops.aten

SHAPES_ONLY = frozenset(
    {aten.full_like.default, aten.ones_like.default, aten.zeros_like.default, aten.empty_like.default}
    | {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
    | {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}
)
"""Operators that read the shape of an operand and not its values: their result is not zero where it is."""


@graph_pass
def without_zero_tangents(backward: fx.GraphModule, tangents: Iterable[int], zero: Set[int]) -> None:
    """Remove what some tangents contribute, because nothing was differentiated through their outputs.

    Before: `dk = add(mm(dy, w), mm(d_state, v)); dw = mm(t(d_state), x); return (dk, dw)`
    After, without `d_state`: `dk = mm(dy, w); return (dk, None)`

    Sound because a backward graph is linear in its tangents: a node that depends on zero tangents and on no
    other tangent is zero. Eager PyTorch does the same: such nodes do not run, and a parameter that is reached
    through them alone has no gradient. Leaves dead nodes to `hoisting`, which copies what it needs.

    Args:
        backward: as the partitioner made it.
        tangents: positions of the tangents among its inputs.
        zero: positions of the tangents that are zero.
    """
    graph = backward.graph
    inputs = graph.find_nodes(op="placeholder")
    others = _reached_from(graph, {inputs[i] for i in tangents if i not in zero})
    zeros = _reached_from(graph, {inputs[i] for i in zero}) - others
    for node in list(graph.nodes):
        if node not in zeros and not zeros.isdisjoint(node.all_input_nodes):
            _read_no_zeros(graph, node, zeros)


def _reached_from(graph: fx.Graph, sources: Set[fx.Node]) -> set[fx.Node]:
    """The sources, and every node whose value depends on the value of a source."""
    reached = set(sources)
    for node in graph.nodes:
        reads_values = node.op == "call_function" and node.target not in SHAPES_ONLY
        if reads_values and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _read_no_zeros(graph: fx.Graph, node: fx.Node, zeros: Set[fx.Node]) -> None:
    """Change a node that reads something zero so that it does not."""
    if node.op == "output":
        gradients: Any = node.args[0]
        node.args = (tuple(None if gradient in zeros else gradient for gradient in gradients),)
    elif (summand := _other_summand(node, zeros)) is not None:
        node.replace_all_uses_with(summand)
    else:
        for source in zeros & set(node.all_input_nodes):
            _read_constant(graph, node, source)


def _other_summand(node: fx.Node, zeros: Set[fx.Node]) -> fx.Node | None:
    """The summand that is not zero, if the node is a sum of two and equal to it in shape and dtype."""
    summands = [source for source in node.args if source not in zeros]
    if node.target is not aten.add.Tensor or node.kwargs or len(summands) != 1:
        return None
    (summand,) = summands
    same = isinstance(summand, fx.Node) and _shape_and_dtype(summand) == _shape_and_dtype(node)
    return summand if same else None  # type: ignore[return-value]


def _shape_and_dtype(node: fx.Node) -> tuple[object, object] | None:
    value = node.meta["val"]
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def _read_constant(graph: fx.Graph, node: fx.Node, zero: fx.Node) -> None:
    """Give a node a constant zero to read; it keeps the original where the shape is symbolic."""
    value = zero.meta["val"]
    if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return
    with graph.inserting_before(node):
        constant = graph.call_function(
            aten.full.default, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device}
        )
    constant.meta["val"] = value
    node.replace_input_with(zero, constant)
