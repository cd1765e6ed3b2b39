"""Analysis of a region's graphs: inputs and gradient slots, flow of gradients, the autograd node of a call.

A *region* is a graph that Dynamo captured; its inputs are known by their position.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from gtcompile.capture.model_io import tensors_of
from gtcompile.graph.joint_graph import JointGraph, count_forward_outputs
from gtcompile.passes.effect_tokens import EFFECTS
from gtcompile.torch_internals import (
    COMPILED_REGION,
    BackwardTokenAOTOutput,
    GradAOTOutput,
    PlainAOTInput,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)

Live = frozenset[int]
"""Positions of a region's inputs whose gradients are computed."""
Histories = frozenset[torch.autograd.graph.Node | None]
"""The autograd nodes that computed some tensors; None for leaves and tensors that do not require grad."""


def requires_grad(value: object) -> bool:
    """Whether an input is a tensor that requires grad."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def pick(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that picks the values at some positions, faster than a comprehension does."""
    if len(positions) < 2:  # for one position `itemgetter` returns no tuple
        return lambda values: [values[i] for i in positions]
    return operator.itemgetter(*positions)


def region_joint(graph: fx.GraphModule) -> JointGraph:
    """The joint graph AOTAutograd made of a region, with slots named by the position of their input."""
    descriptors = graph.graph.output_node().meta["desc"]
    forward_outputs = count_forward_outputs(descriptors)
    slots = tuple(_slot_name(desc) for desc in descriptors[forward_outputs:])
    return JointGraph(module=graph, forward_outputs=forward_outputs, slots=slots, source="region")


def input_name(position: int) -> str:
    """Name of a region's input, and of the slot of its gradient."""
    return f"input {position}"


def _slot_name(descriptor: object) -> str | None:
    if isinstance(descriptor, BackwardTokenAOTOutput):
        return EFFECTS
    if not isinstance(descriptor, GradAOTOutput):
        return None
    source = descriptor.grad_of
    return input_name(source.idx) if isinstance(source, PlainAOTInput) else str(source)


def output_sources(graph: fx.GraphModule) -> tuple[Live, ...]:
    """Per output of a Dynamo graph, the positions of the inputs whose gradients may need it.

    An output depends on an input only along tensors that autograd differentiates: not through `detach`, code
    under `no_grad`, comparisons, `argmin` or integer tensors.

    Args:
        graph: with an `example_value` at every node that is or has tensors.
    """
    positions = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    outputs: Any = graph.graph.output_node().args[0]
    flow = DifferentiableFlow(graph.graph)
    return tuple(
        frozenset(positions[n] for n in flow.ancestors([node]) if n in positions)
        if isinstance(node, fx.Node)
        else frozenset()
        for node in outputs
    )


class DifferentiableFlow:
    """The flow of gradients through a Dynamo graph, from each node back to those that it is computed from.

    Args:
        graph: with an `example_value` at every node that is or has tensors.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._writers = possible_writers(graph)
        # A node whose memory is written to may get its gradient from the writer, even if it was detached.
        self._ends = {node for node in graph.nodes if node not in self._writers and _ends_gradients(node)}

    def ancestors(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """Return the nodes and everything their gradients flow back to."""
        seen: set[fx.Node] = set()
        todo = [node for node in nodes if node not in self._ends]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                sources = {*node.all_input_nodes, *self._writers.get(node, ())}
                todo.extend(sources - self._ends)
        return frozenset(seen)


def _ends_gradients(node: fx.Node) -> bool:
    """Whether a node has tensors of which none requires grad, so that no gradient flows back through it."""
    tensors = tensors_of(node.meta.get("example_value"))
    # Inside a function transform, tensors do not show whether the code around it differentiates them.
    hidden = any(map(is_functorch_wrapped_tensor, tensors))
    return bool(tensors) and not hidden and not any(map(_is_differentiated, tensors))


def _is_differentiated(tensor: torch.Tensor) -> bool:
    # Read `grad_fn` first: that updates the history of a view whose base was written to.
    return tensor.grad_fn is not None or tensor.requires_grad


def possible_writers(graph: fx.Graph) -> Mapping[fx.Node, set[fx.Node]]:
    """By node whose memory is written to, the nodes that may have written: all users of that memory.

    Dynamo's graphs are not functional: after `y[0] = z` later nodes still read the node `y`, and views share
    its memory. Fake tensors know which memory was written to by its version, so no list of operators is
    needed.

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
    return dict(writers)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor inside `vmap` wraps, and any other tensor itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def histories(inputs: Iterable[object]) -> Histories:
    """The autograd nodes that computed the inputs of a call; taken before the call, which may change them."""
    return frozenset(value.grad_fn for value in inputs if isinstance(value, torch.Tensor))


def region_node(outputs: Iterable[object], before: Histories) -> torch.autograd.graph.Node | None:
    """The autograd node of one call of a compiled region, or None when nothing needs a gradient.

    The search follows the histories of views. It does not enter those of the inputs: an output that is an
    unchanged input leads to the node that computed the input, perhaps in another region.

    Args:
        outputs: of the call.
        before: the histories of its inputs before the call.
    """
    others: set[torch.autograd.graph.Node | None] = set(before)
    todo = [value.grad_fn for value in outputs if isinstance(value, torch.Tensor)]
    while todo:
        node = todo.pop(0)
        if node is None or node in others:
            continue
        if node.name() == COMPILED_REGION:
            return node
        others.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
    return None


def gradient_positions(outputs: Sequence[object], node: torch.autograd.graph.Node) -> dict[int, int]:
    """By position of an output, the position of its gradient among those that the call's node receives.

    Args:
        outputs: of the call; views of one output share a position, and unchanged inputs have none.
        node: of the call.
    """
    positions = {}
    for i, output in enumerate(outputs):
        edge = (output.grad_fn, output.output_nr) if isinstance(output, torch.Tensor) else (None, 0)
        while edge[0] is not None and edge[0] is not node:
            edge = next(iter(edge[0].next_functions), (None, 0))
        if edge[0] is node:
            positions[i] = edge[1]
    return positions
