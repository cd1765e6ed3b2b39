"""Leave out of a backward graph what only outputs that nobody differentiated ask for."""

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import fx

from gtcompile.graph.joint_graph import copy_module

aten = torch.ops.aten

SHAPES_ONLY = frozenset(
    {aten.full_like.default, aten.ones_like.default, aten.zeros_like.default, aten.empty_like.default}
    | {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
    | {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}
)
"""Operators that read no value of their operand: what they return is not zero where the operand is."""


def without_zero_tangents(
    backward: fx.GraphModule, tangents: Iterable[int], zero: Set[int]
) -> fx.GraphModule:
    """The backward where some tangents are zero, because nothing was differentiated through their outputs.

    Before: `dk = add(mm(dy, w), mm(d_state, v)); dw = mm(t(d_state), x); return (dk, dw)`
    After, without `d_state`: `dk = mm(dy, w); return (dk, None)`

    Sound because a backward is linear in its tangents: a node that depends on zero tangents and on no other
    is zero. What eager PyTorch does: such nodes do not run, and a parameter that only they lead to has no
    gradient. Dead nodes stay for who takes parts of the graph.

    Args:
        backward: as the partitioner made it; left as it is.
        tangents: positions of the tangents among its inputs.
        zero: those of them that are zero.
    """
    result = copy_module(backward)
    graph = result.graph
    inputs = graph.find_nodes(op="placeholder")
    others = reached_from(graph, {inputs[i] for i in tangents if i not in zero})
    zeros = reached_from(graph, {inputs[i] for i in zero}) - others
    for node in list(graph.nodes):
        if node not in zeros and not zeros.isdisjoint(node.all_input_nodes):
            _read_no_zeros(graph, node, zeros)
    result.recompile()
    return result


def reached_from(graph: fx.Graph, sources: Set[fx.Node]) -> set[fx.Node]:
    """The sources and every node whose value depends on one of theirs."""
    reached = set(sources)
    for node in graph.nodes:
        reads_values = node.op == "call_function" and node.target not in SHAPES_ONLY
        if reads_values and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _read_no_zeros(graph: fx.Graph, node: fx.Node, zeros: Set[fx.Node]) -> None:
    """Have a node that reads something zero do without."""
    if node.op == "output":
        gradients: Any = node.args[0]
        node.args = (tuple(None if gradient in zeros else gradient for gradient in gradients),)
    elif (summand := _other_summand(node, zeros)) is not None:
        node.replace_all_uses_with(summand)
    else:
        for source in zeros & set(node.all_input_nodes):
            _read_constant(graph, node, source)


def _other_summand(node: fx.Node, zeros: Set[fx.Node]) -> fx.Node | None:
    """Of a sum with something zero the other summand, where the sum is nothing else."""
    summands = [source for source in node.args if source not in zeros]
    if node.target is not aten.add.Tensor or node.kwargs or len(summands) != 1:
        return None
    (summand,) = summands
    same = isinstance(summand, fx.Node) and _kind(summand) == _kind(node)
    return summand if same else None  # type: ignore[return-value]


def _kind(node: fx.Node) -> tuple[object, object] | None:
    value = node.meta["val"]
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def _read_constant(graph: fx.Graph, node: fx.Node, zero: fx.Node) -> None:
    """Have a node read zeros that nothing computes, but where sizes are symbols."""
    value = zero.meta["val"]
    if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return
    with graph.inserting_before(node):
        constant = graph.call_function(
            aten.full.default, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device}
        )
    constant.meta["val"] = value
    node.replace_input_with(zero, constant)
