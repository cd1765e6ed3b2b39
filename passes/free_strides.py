"""Allow strides at run time that differ from the strides in the trace."""

import torch

from gtcompile.passes.contract import G, graph_pass
from gtcompile.passes.writable_outputs import follows_reshape

aten = torch.ops.aten


@graph_pass
def free_strides(given: G) -> None:
    """Replace every `view` and `_unsafe_view` by a `reshape`.

    Before: `y = view(x, [6, 4])`
    After:  `y = reshape(x, [6, 4])`

    Sound because `reshape` returns a view if the strides allow one, else a copy of the values. This is needed
    if a value may have other strides than its fake tensor: compiled code chooses the strides of its outputs,
    and so do some operators. An `_unsafe_view` of a `reshape` to its own size is possible with any strides
    and stays (see `writable_outputs.py`).
    """
    for view in (aten.view.default, aten._unsafe_view.default):
        for node in given.graph.find_nodes(op="call_function", target=view):
            if not follows_reshape(node):
                node.target = aten.reshape.default
