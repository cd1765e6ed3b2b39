"""The joint graph as a networkx graph, whose nodes are annotated with costs and dependent parameters.

A backward node runs if and only if the gradient of a trained parameter depends on it. So each node is
annotated with the parameters whose gradients depend on it, and costs of a trained set follow from these.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import getitem
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.capture.model_io import LossFunction, unwrap
from gtcompile.graph.flop_registry import register_missing_formulas
from gtcompile.graph.flops import node_flops, output_flops, refuse_unknown
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.graph.module_paths import input_of, module_paths
from gtcompile.state.restore import everything_trainable
from gtcompile.torch_internals import TangentAOTInput

FORWARD, BACKWARD = "forward", "backward"
TANGENT = "tangent"


def dependency_graph(
    model: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None
) -> "nx.DiGraph[str]":
    """Capture one training step of a model as a graph to analyse with networkx.

    An edge leads from each node to every node that reads its value. Nodes have the names of the joint graph,
    and these attributes:

    * `flops`: int, FLOPs per training step, 2 per multiply-add.
    * `bytes`: int, size of its value; a view counts like a copy.
    * `direction`: `"forward"` if the loss depends on it, `"backward"` if only gradients do.
    * `module`: path of the module it belongs to (`"model.layers.0.fc1"`); empty if unknown.
    * `parameters`: frozenset of the FQNs whose gradients cannot be computed without it.
    * `operator`: `"aten.mm.default"`; for graph inputs `"parameter FQN"`, `"input"` or `"tangent"`.
    * `gradient_of`: FQN of the parameter whose gradient it is; None for other nodes.

    The FLOPs of a step are the sum of `flops` over the forward nodes, and over the backward nodes with at
    least one trained parameter in `parameters`. `BackwardCosts.step_flops` computes this sum.

    Args:
        model: returns its loss, unless there is a `loss_fn`; may be on the meta device, without weights.
        batch: the keyword dictionary of one batch, labels included; with `loss_fn`, anything it takes.
        loss_fn: from the model and the batch to the scalar loss.

    Raises:
        CaptureError: the model cannot be captured, or an operator's FLOPs are unknown.
        ValueError, TypeError: the batch does not fit the model's forward.
    """
    return dependencies(capture_everything(model, batch, loss_fn))


def capture_everything(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> JointGraph:
    """Capture a model, with the gradients of all parameters that were trainable before `train_only`."""
    with everything_trainable(unwrap(model)):
        return capture(model, batch, loss_fn=loss_fn)


def dependencies(joint: JointGraph) -> "nx.DiGraph[str]":
    """Convert a joint graph to the networkx graph that `dependency_graph` describes.

    Args:
        joint: as captured, with every gradient live.

    Raises:
        CaptureError: naming every matmul-like operator without a FLOP formula.
    """
    graph, paths, live = dependencies_with_costs(joint), module_paths(joint), joint.live
    slots = zip(joint.slots, joint.gradients, strict=True)
    gradients = {node: slot for slot, node in slots if node is not None and slot in live}
    for node in nodes_of(joint):
        graph.nodes[node.name].update(
            bytes=_bytes_of(node.meta.get("val")),
            module=paths[node],
            operator=operator_of(node),
            gradient_of=gradients.get(node),
        )
    return graph


def dependencies_with_costs(joint: JointGraph) -> "nx.DiGraph[str]":
    """Convert a joint graph like `dependencies`, but only with the attributes that decide what a step costs.

    These are `flops`, `direction` and `parameters`. Every selection computes costs, so what they do not need
    is left out.
    """
    nodes = nodes_of(joint)
    work, forward, needed = work_by_node(nodes), joint.forward_nodes(), parameters_needing(joint, nodes)
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in nodes:
        graph.add_node(
            node.name,
            flops=work.get(node, 0),
            direction=FORWARD if node in forward or _is_primal(node) else BACKWARD,
            parameters=needed[node],
        )
    graph.add_edges_from((source.name, node.name) for node in nodes for source in node.all_input_nodes)
    return graph


def nodes_of(joint: JointGraph) -> list[fx.Node]:
    """Return the nodes of a joint graph that have a value: all but the output."""
    return [node for node in joint.graph.nodes if node.op != "output"]


def parameters_needing(joint: JointGraph, nodes: Sequence[fx.Node]) -> dict[fx.Node, frozenset[str]]:
    """Return for each node the FQNs of the parameters whose gradients depend on it.

    Gradients of activations on which the model itself calls `requires_grad_()` are computed for every trained
    set, so they count as needed by every parameter.
    """
    # One pass in reverse topological order, with one bit per parameter. `nx.ancestors` of every gradient
    # gives the same result, but traverses most of the graph once per parameter: 1.5 s instead of 0.01 s on
    # OPT-2.7B.
    names = sorted(joint.live)
    bits, everybody = {name: 1 << i for i, name in enumerate(names)}, (1 << len(names)) - 1
    needed = dict.fromkeys(nodes, 0)
    for slot, gradient in zip(joint.slots, joint.gradients, strict=True):
        if slot is not None and gradient is not None:
            needed[gradient] |= bits.get(slot, everybody)
    for node in reversed(nodes):
        for source in node.all_input_nodes:
            needed[source] |= needed[node]
    sets = {mask: _names_at(mask, names) for mask in set(needed.values())}
    return {node: sets[mask] for node, mask in needed.items()}


def _names_at(mask: int, names: Sequence[str]) -> frozenset[str]:
    """Return the names at the positions of the bits that are set, the lowest bit first."""
    return frozenset(itertools.compress(names, map(int, reversed(f"{mask:b}"))))


def work_by_node(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Return the FLOPs per training step of each node.

    Some operators compute each output only if it is wanted, such as a convolution's backward. Their FLOPs are
    attributed to the `getitem` nodes of their outputs, and none to the operator itself.

    Raises:
        CaptureError: lists every matmul-like operator without a FLOP formula.
    """
    register_missing_formulas()
    nodes = [node for node in nodes if node.op == "call_function"]
    refuse_unknown(nodes)
    work: defaultdict[fx.Node, int] = defaultdict(int)
    for node in nodes:
        by_output = output_flops(node)
        if not by_output:
            work[node] += node_flops(node)
        for user in node.users if by_output else ():
            assert user.target is getitem
            work[user] += by_output.get(user.args[1], 0)  # type: ignore[arg-type]
    return dict(work)


def operator_of(node: fx.Node) -> str:
    """Return the operator's name, or the meaning of a graph input, as `dependency_graph` describes."""
    if node.op == "placeholder":
        return TANGENT if _is_tangent(node) else input_of(node)
    return _name_of(node.target) if node.op == "call_function" else node.op


@functools.cache
def _name_of(target: object) -> str:
    name = str(target)
    return name if "." in name else str(getattr(target, "__name__", name))


def _is_tangent(node: fx.Node) -> bool:
    return isinstance(node.meta.get("desc"), TangentAOTInput)


def _is_primal(node: fx.Node) -> bool:
    return node.op == "placeholder" and not _is_tangent(node)


def _bytes_of(value: Any) -> int:
    """Return the size of a tensor, or of all tensors in a tuple, in bytes."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, (tuple, list)) else 0
