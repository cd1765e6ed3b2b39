"""Keep what a graph returns writable."""

import torch
from torch import fx

from gtcompile.passes.contract import G, graph_pass

aten = torch.ops.aten


@graph_pass
def keep_outputs_writable(given: G) -> None:
    """Put a `reshape` before every `_unsafe_view` that the graph returns.

    Before: `return _unsafe_view(x, [6, 4])`
    After:  `y = reshape(x, [6, 4]); return _unsafe_view(y, [6, 4])`

    Sound because the second call changes nothing but what autograd knows of the result: it forbids writes
    into a view that an autograd function returns, and for autograd `_unsafe_view` returns none. The first
    call takes values of any strides. Other views are left to `free_strides`.
    """
    graph, output = given.graph, given.graph.output_node()
    for node in graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        if output in node.users and not follows_reshape(node):
            with graph.inserting_before(node):
                reshaped = graph.call_function(aten.reshape.default, node.args)
            reshaped.meta = dict(node.meta)
            node.args = (reshaped, node.args[1])


def follows_reshape(node: fx.Node) -> bool:
    """Whether an `_unsafe_view` views the result of a `reshape` to the same size."""
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and source.target is aten.reshape.default
        and source.args[1] == node.args[1]
    )
