"""Clear the masks of backward-operator outputs that no node reads."""

from operator import getitem

import torch
from torch import fx

from gtcompile.passes.contract import G, graph_pass

aten = torch.ops.aten

MASKED_OPERATORS = (
    aten.convolution_backward.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.native_batch_norm_backward.default,
    aten._fused_rms_norm_backward.default,
    aten.linear_backward.default,
)
"""Operators whose last argument is `output_mask`, one truth value per output."""


@graph_pass
def narrow_output_masks(given: G) -> None:
    """Clear the mask of every output of a backward operator that no node reads.

    Before: `g = native_layer_norm_backward(..., [True, True, True]); dx = g[0]`
    After:  `g = native_layer_norm_backward(..., [True, False, False]); dx = g[0]`

    Sound because these operators compute their outputs independently. Run `eliminate_dead_nodes` first: a
    dead `getitem` counts as a reader.
    """
    for node in given.graph.nodes:
        if node.target in MASKED_OPERATORS:
            _narrow(node)


def _narrow(node: fx.Node) -> None:
    read = {user.args[1] for user in node.users if user.target is getitem}
    if len(read) < len(node.users):
        return  # a node reads the whole tuple
    mask = list(node.args[-1])  # type: ignore[arg-type]
    narrowed = [bool(wanted) and index in read for index, wanted in enumerate(mask)]
    if narrowed != mask:
        node.args = (*node.args[:-1], narrowed)
        values = zip(node.meta["val"], narrowed, strict=True)
        node.meta["val"] = tuple(value if wanted else None for value, wanted in values)
