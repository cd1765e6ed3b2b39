"""Move weight gradients out of a backward graph, so that one compilation serves every trained set.

Weight gradients are leaves of the backward: nothing reads them. What remains without them, the *chain* of
activation gradients, is compiled once; it hands out the operands of the leaves, and a leaf runs only when its
parameter is trained.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtcompile.flops import node_flops
from gtcompile.joint import ancestors

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.t.default,
        aten.permute.default,
        aten.transpose.int,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
"""Operators that cost nothing and may as well run next to the leaf they serve."""

SCATTERS = frozenset(
    {
        aten.embedding_dense_backward.default,
        aten.index_put.default,
        aten._unsafe_index_put.default,
        aten.scatter_add.default,
        aten.index_add.default,
    }
)
"""Operators without FLOPs that write a gradient as large as the parameter."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a leaf finds one of its inputs."""

    saved: bool
    """True for an input of the backward graph, False for an output of the chain."""
    index: int
    """Position among the backward graph's inputs, or among the chain's outputs."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """How to finish one weight gradient."""

    slot: int
    """Position of the gradient among the backward graph's outputs."""
    module: fx.GraphModule
    """From the operands to the gradient."""
    flops: int
    """FLOPs of running it once."""
    operands: tuple[Operand, ...]
    """In the order `module` takes them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a backward graph that can run by itself."""

    module: fx.GraphModule
    """Takes the inputs it reads and no others; returns a tuple."""
    inputs: tuple[int, ...]
    """Their positions among the backward graph's inputs."""

    @property
    def flops(self) -> int:
        """FLOPs of running it once."""
        return sum(node_flops(node) for node in self.module.graph.nodes if node.op == "call_function")


@dataclass(frozen=True, slots=True, kw_only=True)
class HoistedBackward:
    """A backward graph in two parts: what is compiled, and what runs on demand."""

    chain: Part
    """Outputs: the slots it computes itself, then the leaves' operands."""
    chain_slots: tuple[int, ...]
    """Slots the chain computes: gradients of activations, and of parameters too cheap to hoist."""
    leaves: tuple[Leaf, ...]
    """In slot order."""

    def __str__(self) -> str:
        size = len(self.chain.module.graph.nodes)
        return f"chain of {size} nodes with {len(self.chain_slots)} slots, {len(self.leaves)} leaves"


def hoist_weight_gradients(backward: fx.GraphModule, keep: Set[int], hoist: Set[int]) -> HoistedBackward:
    """Split a backward graph into the chain and its leaves.

    Before: `dx = mm(dy, w); dw = mm(t(dy), x); return (dx, dw)`
    After:  chain `dx = mm(dy, w); return (dx, dy)`, leaf of slot 1 `(dy, x) -> mm(t(dy), x)`

    Sound because a leaf's nodes serve its slot alone, so the chain never misses them, and a leaf sees the
    very values the graph would have fed it.

    Args:
        backward: as the partitioner made it; left as it is.
        keep: slots that the chain must compute.
        hoist: slots that may become leaves; a slot without matrix products or scatters stays in the chain.
    """
    output = backward.graph.output_node()
    gradients: Any = output.args[0]
    bodies = {
        slot: leaf_nodes(gradients[slot], output) for slot in sorted(hoist) if gradients[slot] is not None
    }
    bodies = {slot: body for slot, body in bodies.items() if body}
    chain_slots = tuple(
        slot
        for slot, gradient in enumerate(gradients)
        if gradient is not None and slot not in bodies and (slot in keep or slot in hoist)
    )
    handed_out = [gradients[slot] for slot in chain_slots]
    inputs = backward.graph.find_nodes(op="placeholder")
    leaves = []
    for slot, body in bodies.items():
        ordered = [node for node in backward.graph.nodes if node in body]
        operands = list(dict.fromkeys(i for node in ordered for i in node.all_input_nodes if i not in body))
        handed_out += [o for o in operands if o.op != "placeholder" and o not in handed_out]
        sources = tuple(_source(operand, inputs, handed_out) for operand in operands)
        flops = sum(node_flops(node) for node in ordered)
        leaves.append(Leaf(slot, _leaf_module(ordered, operands, gradients[slot]), flops, sources))
    return HoistedBackward(chain=extract(backward, handed_out), chain_slots=chain_slots, leaves=tuple(leaves))


def leaf_nodes(gradient: fx.Node, output: fx.Node) -> frozenset[fx.Node]:
    """The matrix products or scatters that serve this slot alone, with what follows and the views before.

    Empty when there is no such product or scatter.
    """
    private = _private(gradient, output)
    heavy = {node for node in private if node.target in SCATTERS or _has_flops(node)}
    body = set(heavy)
    for node in sorted(private - body):
        if any(source in body for source in node.all_input_nodes):
            body.add(node)
    for node in sorted(private - body, reverse=True):
        if node.target in VIEWS and all(user in body for user in node.users):
            body.add(node)
    return frozenset(body) if heavy else frozenset()


def _private(gradient: fx.Node, output: fx.Node) -> set[fx.Node]:
    """Nodes that nothing but this slot needs."""
    if [*output.all_input_nodes].count(gradient) != 1 or list(output.args[0]).count(gradient) != 1:  # type: ignore[arg-type]
        return set()
    private: set[fx.Node] = set()
    for node in sorted(ancestors([gradient]), reverse=True):
        users_private = all(user in private or (user is output and node is gradient) for user in node.users)
        if node.op == "call_function" and users_private:
            private.add(node)
    return private


def _has_flops(node: fx.Node) -> bool:
    return node.op == "call_function" and node_flops(node) > 0


def _source(operand: fx.Node, inputs: list[fx.Node], handed_out: list[fx.Node]) -> Operand:
    if operand.op == "placeholder":
        return Operand(saved=True, index=inputs.index(operand))
    return Operand(saved=False, index=handed_out.index(operand))


def _leaf_module(body: list[fx.Node], operands: list[fx.Node], gradient: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    twin = {operand: graph.placeholder(operand.name) for operand in operands}
    for node in body:
        twin[node] = graph.node_copy(node, twin.__getitem__)
    graph.output(twin[gradient])
    free_strides(graph)
    return fx.GraphModule({}, graph)


def extract(backward: fx.GraphModule, outputs: Sequence[fx.Node | None]) -> Part:
    """What these outputs need of a backward graph, which after partitioning has no side effects."""
    needed = ancestors(node for node in outputs if node is not None)
    graph = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in backward.graph.nodes:
        if node in needed:
            twin[node] = graph.node_copy(node, twin.__getitem__)
    result = graph.output(tuple(None if node is None else twin[node] for node in outputs))
    result.meta = dict(backward.graph.output_node().meta)
    placeholders = backward.graph.find_nodes(op="placeholder")
    read = tuple(index for index, node in enumerate(placeholders) if node in needed)
    return Part(fx.GraphModule(backward, graph), read)


def free_strides(graph: fx.Graph) -> None:
    """Let views be copies where strides ask for it: compiled code may lay its outputs out in its own way."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
