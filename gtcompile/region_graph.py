"""What the joint graph of a region means: its slots, by the position of the region's inputs."""

from torch import fx

from gtcompile.capture import count_forward_outputs
from gtcompile.joint import JointGraph
from gtcompile.torch_internals import GradAOTOutput, PlainAOTInput

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


def _slot_name(descriptor: object) -> str | None:
    if not isinstance(descriptor, GradAOTOutput):
        return None
    source = descriptor.grad_of
    return input_name(source.idx) if isinstance(source, PlainAOTInput) else str(source)
