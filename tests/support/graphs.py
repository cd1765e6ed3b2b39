"""Running and reading graphs in tests."""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.graph.flops import node_flops
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.torch_internals import (
    BufferAOTInput,
    ParamAOTInput,
    TangentAOTInput,
    min_cut_rematerialization_partition,
)
from tests.support.models import Recipe

aten = torch.ops.aten


@functools.cache
def capture_of(recipe: Recipe) -> JointGraph:
    """One capture for all tests of a recipe: nothing may change it."""
    return capture(recipe.model(), recipe.batch())


def run_joint(joint: JointGraph, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Forward outputs and gradients by FQN of a captured graph, slots of one weight added up."""
    outputs = run_graph(joint.module, inputs_of(joint, model, batch))
    gradients: dict[str, Any] = {}
    for slot, gradient in zip(joint.slots, outputs[joint.forward_outputs :], strict=True):
        if gradient is not None:
            gradients[slot] = gradient if slot not in gradients else gradients[slot] + gradient
    return list(outputs[: joint.forward_outputs]), gradients


def run_graph(module: fx.GraphModule, inputs: Iterable[Any]) -> list[Any]:
    """A graph's outputs on these values, one per placeholder."""
    with torch.no_grad():
        return list(fx.Interpreter(module).run(*inputs, enable_io_processing=False))


def inputs_of(joint: JointGraph, model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Values of a captured graph's placeholders: the model's, the batch's, and 1 for the loss's tangent."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    values = []
    for node in joint.module.graph.find_nodes(op="placeholder"):
        meaning = node.meta["desc"]
        if isinstance(meaning, (ParamAOTInput, BufferAOTInput)):
            values.append(named[meaning.target.removeprefix("model.")].detach())
        elif isinstance(meaning, TangentAOTInput):
            values.append(torch.ones(()))
        else:
            values.append(list(batch.values())[meaning.idx])
    return values


def backward_of(joint: JointGraph) -> fx.GraphModule:
    """The backward half of a captured graph, as hoisting is given it."""
    joint = joint.copy()
    inputs = [node.meta["val"] for node in joint.module.graph.find_nodes(op="placeholder")]
    _, backward = min_cut_rematerialization_partition(
        joint.module, inputs, num_fwd_outputs=joint.forward_outputs
    )
    return backward


def random_inputs(module: fx.GraphModule) -> list[Any]:
    """Random values of the shapes and strides a graph was traced with."""
    values = (node.meta["val"] for node in module.graph.find_nodes(op="placeholder"))
    return [random_like(value) for value in values]


def random_like(value: Any) -> Any:
    """A random tensor with the type, shape and strides of a fake one; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return twin.normal_() if value.is_floating_point() else twin.zero_()


def text_of(module: fx.GraphModule) -> str:
    """A graph written out; equal texts are equal graphs."""
    *nodes, output = module.graph.nodes
    return "\n".join([*(str(node.format_node()) for node in nodes), f"return {tuple(output.args[0])}"])


def operators(module: fx.GraphModule) -> Counter[Any]:
    """How often each operator is in a graph."""
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def flops_of(nodes: Iterable[fx.Node]) -> int:
    """FLOPs of running these nodes once."""
    return sum(node_flops(node) for node in nodes if node.op == "call_function")
