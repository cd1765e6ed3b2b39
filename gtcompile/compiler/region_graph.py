"""What the graphs of a region mean, by the position of its inputs: where outputs come from, and slots."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from gtcompile.capture.model_io import tensors_of
from gtcompile.graph.joint_graph import JointGraph, ancestors, count_forward_outputs
from gtcompile.torch_internals import (
    GradAOTOutput,
    PlainAOTInput,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)

Live = frozenset[int]
"""Positions of a region's inputs whose gradients are computed."""


def region_joint(graph: fx.GraphModule) -> JointGraph:
    """The joint graph AOTAutograd made of a region, its slots named by the position of the input."""
    descriptors = graph.graph.output_node().meta["desc"]
    forward_outputs = count_forward_outputs(descriptors)
    slots = tuple(_slot_name(desc) for desc in descriptors[forward_outputs:])
    return JointGraph(module=graph, forward_outputs=forward_outputs, slots=slots, source="region")


def input_name(position: int) -> str:
    """Name of a region's input, and of the slot of its gradient."""
    return f"input {position}"


def output_sources(graph: fx.GraphModule) -> tuple[Live, ...]:
    """Per output of a Dynamo graph, the positions of the inputs it may be computed from."""
    positions = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    writers = possible_writers(graph.graph)
    outputs: Any = graph.graph.output_node().args[0]
    return tuple(
        frozenset(positions[n] for n in ancestors([node], writers) if n in positions)
        if isinstance(node, fx.Node)
        else frozenset()
        for node in outputs
    )


def possible_writers(graph: fx.Graph) -> Mapping[fx.Node, set[fx.Node]]:
    """By node whose memory is written to, the nodes that may have done that: all that read of the memory.

    Dynamo's graphs are not functional: `y[0] = z` leaves `y` what it was for all later nodes, and views share
    the memory. Which operators write is not asked but what fake tensors know: their memory and its version.

    Args:
        graph: with an `example_value` at every node that is or has tensors.
    """
    holders, written = defaultdict(set), set()
    for node in graph.nodes:
        tensors = map(_unwrapped, tensors_of(node.meta.get("example_value")))
        for tensor in (t for t in tensors if t.layout is torch.strided):  # others have no memory of their own
            memory = tensor.untyped_storage()._cdata
            holders[memory].add(node)
            if not tensor.is_inference() and tensor._version:
                written.add(memory)
    writers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for memory in written:
        readers = {user for holder in holders[memory] for user in holder.users}
        for holder in holders[memory]:
            writers[holder] |= readers
    return writers


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor inside `vmap` wraps; any other itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _slot_name(descriptor: object) -> str | None:
    if not isinstance(descriptor, GradAOTOutput):
        return None
    source = descriptor.grad_of
    return input_name(source.idx) if isinstance(source, PlainAOTInput) else str(source)
