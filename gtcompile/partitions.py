"""A joint graph split into forward and backward, saving no more for backward than a budget of memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from gtcompile.torch_internals import OpOverload, functorch_config, min_cut_rematerialization_partition

LEAST_BUDGET = 1e-9
"""Stands for 0, at which torch's partitioner saves the inputs and nothing else, random numbers included."""


def partition(
    graph: fx.GraphModule, joint_inputs: Sequence[object], memory_budget: float, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph where least is saved for backward, and recompute what a budget leaves no room for.

    Sound because whatever draws random numbers is saved: drawn again, they would be others.

    Args:
        graph: taken over.
        joint_inputs: as AOTAutograd hands them to a partitioner.
        memory_budget: the share, in [0, 1], of the bytes saved beside the inputs when nothing that costs
            FLOPs is recomputed.
        **kwargs: as AOTAutograd hands them to a partitioner.
    """
    if memory_budget < 1:
        for node in graph.graph.nodes:
            if draws_random_numbers(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with functorch_config.patch(activation_memory_budget=max(memory_budget, LEAST_BUDGET)):
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)
    return forward, backward


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether running a node twice gives two results; attention does so where it drops anything."""
    operator = node.target
    if not isinstance(operator, OpOverload) or torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given.get("dropout_p", 0.0) != 0.0)
