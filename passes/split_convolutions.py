"""Compute the gradients of a convolution's input, weight and bias in separate nodes."""

from operator import getitem
from typing import Any

import torch
from torch import fx

from gtcompile.passes.contract import G, graph_pass

aten = torch.ops.aten


@graph_pass
def split_convolutions(given: G) -> None:
    """Split a convolution's backward, so that its weight gradient becomes a leaf of the backward graph.

    Before: `g = convolution_backward(dy, x, w, ..., [True, True, True]); dx = g[0]; dw = g[1]; db = g[2]`
    After:  `dx = convolution_backward(dy, x, w, ..., [True, False, False])[0]`,
            `dw = convolution_backward(dy, x, w, ..., [False, True, False])[1]`, `db = sum(dy, [0, 2, ...])`

    Sound because the operator computes its outputs independently, so no work is done twice. The bias gradient
    becomes a sum, as in Inductor on GPUs, because torch's CPU kernel would compute the weight gradient too.
    """
    graph = given.graph
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        read = [user.args[1] for user in node.users if user.target is getitem]
        if 1 in read and len(read) == len(node.users) > 1:
            for output in list(node.users):
                _compute_alone(graph, node, output)
            graph.erase_node(node)


def _compute_alone(graph: fx.Graph, together: fx.Node, output: fx.Node) -> None:
    """Replace one output of a convolution's backward by a node that computes only this output."""
    index: Any = output.args[1]
    gradient: Any = together.args[0]
    with graph.inserting_before(output):
        if index == 2:
            spatial = range(2, gradient.meta["val"].dim())
            alone = graph.call_function(aten.sum.dim_IntList, (gradient, [0, *spatial]))
        else:
            mask = [index == i for i in range(3)]
            node = graph.call_function(together.target, (*together.args[:-1], mask))  # type: ignore[arg-type]
            node.meta = {**together.meta, "val": _only(together.meta["val"], index)}
            alone = graph.call_function(getitem, (node, index))
    alone.meta = dict(output.meta)
    output.replace_all_uses_with(alone)
    graph.erase_node(output)


def _only(values: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return tuple(value if i == index else None for i, value in enumerate(values))
