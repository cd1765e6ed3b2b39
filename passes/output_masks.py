"""Make operators that compute gradients leave out those that no node reads."""

from collections.abc import Mapping, Set
from operator import getitem
from typing import Any

import torch
from torch import fx

from gtcompile.graph.flops import forward_gradients
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
    """Clear the mask, or the flag, of every gradient that no node reads.

    Before: `g = native_layer_norm_backward(..., [True, True, True]); dx = g[0]`
    After:  `g = native_layer_norm_backward(..., [True, False, False]); dx = g[0]`

    Cross-entropy in chunks computes its gradients in the forward, and has one flag for each.

    Sound because these operators compute their outputs independently. Run `eliminate_dead_nodes` first: a
    dead `getitem` counts as a reader.
    """
    for node in given.graph.nodes:
        read = _read(node)
        if read is None:
            continue
        if node.target in MASKED_OPERATORS:
            _narrow_mask(node, read)
        elif flags := forward_gradients(node):
            _clear_flags(node, flags, read)


def _read(node: fx.Node) -> set[int] | None:
    """Positions of the outputs that are read; None if a node reads the whole tuple."""
    picked: Any = {user.args[1] for user in node.users if user.target is getitem}
    return picked if len(picked) == len(node.users) else None


def _narrow_mask(node: fx.Node, read: Set[int]) -> None:
    mask = list(node.args[-1])  # type: ignore[arg-type]
    narrowed = [bool(wanted) and index in read for index, wanted in enumerate(mask)]
    if narrowed != mask:
        node.args = (*node.args[:-1], narrowed)
        values = zip(node.meta["val"], narrowed, strict=True)
        node.meta["val"] = tuple(value if wanted else None for value, wanted in values)


def _clear_flags(node: fx.Node, flags: Mapping[int, int], read: Set[int]) -> None:
    """Clear the flags of unread gradients, which then are empty tensors of as many dimensions."""
    args, values = list(node.args), list(node.meta["val"])
    for output in flags.keys() - read:
        args[flags[output]] = False
        values[output] = values[output].new_empty((0,) * values[output].dim())
    node.args, node.meta["val"] = tuple(args), tuple(values)
