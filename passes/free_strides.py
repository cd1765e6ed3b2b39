"""Allow strides at run time that differ from the strides in the trace."""

import torch

from gtcompile.passes.contract import G, graph_pass

aten = torch.ops.aten


@graph_pass
def free_strides(given: G) -> None:
    """Replace every `view` by a `reshape`, and put a `reshape` before every `_unsafe_view` that is returned.

    Before: `y = view(x, [6, 4]);    return _unsafe_view(y, [2, 12])`
    After:  `y = reshape(x, [6, 4]); return _unsafe_view(reshape(y, [2, 12]), [2, 12])`

    Sound because `reshape` returns a view if the strides allow one, else a copy of the values. This is needed
    if a value may have other strides than its fake tensor: compiled code chooses the strides of its outputs,
    and so do some operators. Autograd forbids writes into a view that an autograd function returns, and
    `_unsafe_view` returns none; inside of a graph nobody asks, so there it becomes a `reshape` too.
    """
    graph, output = given.graph, given.graph.output_node()
    for view in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=view):
            if view is aten.view.default or output not in node.users:
                node.target = aten.reshape.default
                continue
            if node.args[0].target is aten.reshape.default:
                continue
            with graph.inserting_before(node):
                reshaped = graph.call_function(aten.reshape.default, node.args)
            reshaped.meta = dict(node.meta)
            node.args = (reshaped, node.args[1])
