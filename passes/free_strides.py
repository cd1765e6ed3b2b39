"""Let views copy where the strides of a value turn out to be others than in the trace."""

import torch

from gtcompile.passes.contract import G, graph_pass

aten = torch.ops.aten


@graph_pass
def free_strides(given: G) -> None:
    """Replace every `view` by a `reshape`.

    Before: `y = view(x, [6, 4])`
    After:  `y = reshape(x, [6, 4])`

    Sound because a `reshape` is a `view` where the strides allow one, and a copy of the same values where
    they do not. Needed wherever a value may have other strides than its fake tensor: compiled code chooses
    the strides of its outputs, and so do some operators.
    """
    for node in given.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
