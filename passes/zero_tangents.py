"""Remove the contributions of zero tangents from a backward graph."""

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
"""Operators that read only the shape of an operand: if it is zero, their result may not be."""


@graph_pass
def without_zero_tangents(backward: fx.GraphModule, tangents: Iterable[int], zero: Set[int]) -> None:
    """Remove the contributions of tangents that are zero, because their outputs did not affect the loss.

    Before: `dk = add(mm(dy, w), mm(d_state, v)); dw = mm(t(d_state), x); return (dk, dw)`
    After, without `d_state`: `dk = mm(dy, w); return (dk, None)`

    Sound because a backward graph is linear in its tangents: a node that depends on zero tangents and on no
    other tangent is zero. Eager PyTorch does not run such nodes either, and gives no gradient to a parameter
    that is reached only through them. Dead nodes are left to `hoisting`, which copies only live nodes.

    Args:
        backward: a backward graph from the partitioner.
        tangents: positions of the tangents among its inputs.
        zero: positions of the tangents that are zero.
    """
    graph = backward.graph
    inputs = graph.find_nodes(op="placeholder")
    others = _reached_from(graph, {inputs[i] for i in tangents if i not in zero})
    zeros = _reached_from(graph, {inputs[i] for i in zero}) - others
    for node in list(graph.nodes):
        if node not in zeros and not zeros.isdisjoint(node.all_input_nodes):
            _read_no_zeros(node, zeros)


def _reached_from(graph: fx.Graph, sources: Set[fx.Node]) -> set[fx.Node]:
    """Return the sources, and every node whose value depends on the value of a source."""
    reached = set(sources)
    for node in graph.nodes:
        reads_values = node.op == "call_function" and node.target not in SHAPES_ONLY
        if reads_values and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _read_no_zeros(node: fx.Node, zeros: Set[fx.Node]) -> None:
    """Change a node so that it does not read zero nodes."""
    if node.op == "output":
        gradients: Any = node.args[0]
        node.args = (tuple(None if gradient in zeros else gradient for gradient in gradients),)
    elif (summand := _other_summand(node, zeros)) is not None:
        node.replace_all_uses_with(summand)
    else:
        for source in zeros & set(node.all_input_nodes):
            read_constant_zero(node, source)


def _other_summand(node: fx.Node, zeros: Set[fx.Node]) -> fx.Node | None:
    """Return the nonzero operand of an addition, if it has the shape and dtype of the sum; else None."""
    summands = [source for source in node.args if source not in zeros]
    if node.target is not aten.add.Tensor or node.kwargs or len(summands) != 1:
        return None
    (summand,) = summands
    same = isinstance(summand, fx.Node) and _shape_and_dtype(summand) == _shape_and_dtype(node)
    return summand if same else None  # type: ignore[return-value]


def _shape_and_dtype(node: fx.Node) -> tuple[object, object] | None:
    value = node.meta["val"]
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def read_constant_zero(node: fx.Node, zero: fx.Node) -> None:
    """Make a node read a constant zero in place of `zero`, unless the shape of `zero` is symbolic."""
    value = zero.meta["val"]
    if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return
    with node.graph.inserting_before(node):
        constant = node.graph.call_function(
            aten.full.default, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device}
        )
    constant.meta["val"] = value
    node.replace_input_with(zero, constant)
