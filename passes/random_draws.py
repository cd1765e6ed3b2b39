"""Forbid the backward to recompute random draws."""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from gtcompile.passes.contract import graph_pass
from gtcompile.torch_internals import OpOverload


@graph_pass
def save_random_draws(module: fx.GraphModule) -> None:
    """Mark every node that draws random numbers as saved for backward.

    Before: `mask = bernoulli(x, 0.9)`, which the partitioner may draw again in the backward
    After:  `mask = bernoulli(x, 0.9)  # recompute: MUST_SAVE`

    Sound because only a mark changes, which the partitioner reads. A second draw would give other numbers.
    """
    for node in module.graph.nodes:
        if draws_random_numbers(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Attention does only if its dropout is not zero."""
    operator = node.target
    if not isinstance(operator, OpOverload) or torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given.get("dropout_p", 0.0) != 0.0)
