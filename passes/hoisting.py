"""Move weight gradients out of a backward graph, so that one compilation serves every trained set.

Weight gradients are leaves of the backward: nothing reads them. What remains without them, the *chain* of
activation gradients, is compiled once; it hands out the operands of the leaves, and a leaf runs only when its
parameter is trained.
"""

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx

from gtcompile.graph.flops import known_flops
from gtcompile.graph.joint_graph import ancestors

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
    """True for an input of the backward graph, False for a computed value."""
    index: int
    """Position among the backward graph's inputs, or among the computed values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """How to finish one weight gradient, or to compute what several leaves need and the chain does not."""

    serves: frozenset[int]
    """Slots whose gradients need it."""
    slots: tuple[int, ...]
    """Those of them whose gradients it finishes."""
    handed_on: tuple[int, ...]
    """Positions among the computed values of what it computes for other leaves."""
    module: fx.GraphModule
    """From the operands to the finished gradients, then what is handed on."""
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
        return sum(known_flops(node) for node in self.module.graph.nodes if node.op == "call_function")


@dataclass(frozen=True, slots=True, kw_only=True)
class HoistedBackward:
    """A backward graph in two parts: what is compiled, and what runs on demand."""

    chain: Part
    """Outputs, the first of the computed values: the slots it computes itself, then the leaves' operands."""
    chain_slots: tuple[int, ...]
    """Slots the chain computes: gradients of activations, and of parameters too cheap to hoist."""
    leaves: tuple[Leaf, ...]
    """In an order in which every leaf finds its operands."""

    @property
    def handed_on(self) -> int:
        """How many computed values there are beside the chain's outputs."""
        return sum(len(leaf.handed_on) for leaf in self.leaves)

    def __str__(self) -> str:
        size = len(self.chain.module.graph.nodes)
        return f"chain of {size} nodes with {len(self.chain_slots)} slots, {len(self.leaves)} leaves"


def hoist_weight_gradients(backward: fx.GraphModule, keep: Set[int], hoist: Set[int]) -> HoistedBackward:
    """Split a backward graph into the chain and its leaves.

    Before: `dx = mm(dy, w); dw = mm(t(dy), x); return (dx, dw)`
    After:  chain `dx = mm(dy, w); return (dx, dy)`, leaf of slot 1 `(dy, x) -> mm(t(dy), x)`

    Sound because the chain needs no node of a leaf, and a leaf sees the very values the graph would have fed
    it. What several leaves need and no kept slot does, such as the gradient of attention scores by their keys
    where those come from another module, is a leaf that runs before them.

    Args:
        backward: as the partitioner made it; left as it is.
        keep: slots that the chain must compute; without any, it computes all that several slots need.
        hoist: slots that may become leaves; a slot without matrix products or scatters stays in the chain.
    """
    gradients: Any = backward.graph.output_node().args[0]
    slots = [slot for slot in sorted(keep | hoist) if gradients[slot] is not None]
    bodies = leaf_nodes(backward.graph, keep, hoist)
    moved = set(chain.from_iterable(bodies.values()))
    read = dict.fromkeys(chain.from_iterable(map(_operands, bodies.values())))
    chain_slots = tuple(slot for slot in slots if gradients[slot] not in moved)
    handed_out = [gradients[slot] for slot in chain_slots]
    handed_out += [o for o in read if o.op != "placeholder" and o not in moved and o not in handed_out]
    handed_on = [node for node in chain.from_iterable(bodies.values()) if node in read]
    sources = {node: Operand(saved=False, index=i) for i, node in enumerate(handed_out + handed_on)}
    inputs = enumerate(backward.graph.find_nodes(op="placeholder"))
    sources |= {node: Operand(saved=True, index=i) for i, node in inputs}
    finished = {slot: gradients[slot] for slot in slots}
    return HoistedBackward(
        chain=extract(backward, handed_out),
        chain_slots=chain_slots,
        leaves=tuple(_leaf(serves, body, finished, sources, read) for serves, body in bodies.items()),
    )


def leaf_nodes(graph: fx.Graph, keep: Set[int], hoist: Set[int]) -> dict[frozenset[int], list[fx.Node]]:
    """The matrix products or scatters that may run on demand, with what follows and the views before.

    Returns:
        Nodes by the slots that need them, those that most slots need first; what several slots need and a
        kept one does not is on demand only where a slot is kept.
    """
    serves = _served_slots(graph, keep | hoist)
    movable = {
        node: slots
        for node, slots in serves.items()
        if node.op == "call_function" and (slots.isdisjoint(keep) if keep else len(slots) == 1)
    }
    body = {node for node in movable if node.target in SCATTERS or _has_flops(node)}
    for node in movable:
        if any(source in body for source in node.all_input_nodes):
            body.add(node)
    for node in reversed(movable):
        if node.target in VIEWS and all(u in body and serves[u] == serves[node] for u in node.users):
            body.add(node)
    bodies: dict[frozenset[int], list[fx.Node]] = {}
    for node in movable:
        if node in body:
            bodies.setdefault(serves[node], []).append(node)
    return dict(sorted(bodies.items(), key=lambda item: (-len(item[0]), sorted(item[0]))))


def _served_slots(graph: fx.Graph, slots: Set[int]) -> dict[fx.Node, frozenset[int]]:
    """Per node, in the graph's order, which of some slots need it; nodes that none needs are left out."""
    output = graph.output_node()
    gradients: Any = output.args[0]
    serves: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(graph.nodes):
        own = (slot for slot in slots if gradients[slot] is node) if output in node.users else ()
        if needed := frozenset(own).union(*(serves.get(user, ()) for user in node.users)):
            serves[node] = needed
    return dict(reversed(serves.items()))


def _operands(body: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """What these nodes read of others, in order."""
    inside = set(body)
    return dict.fromkeys(i for node in body for i in node.all_input_nodes if i not in inside)


def _has_flops(node: fx.Node) -> bool:
    return node.op == "call_function" and known_flops(node) > 0


def _leaf(
    serves: frozenset[int],
    body: Sequence[fx.Node],
    gradients: Mapping[int, fx.Node],
    sources: Mapping[fx.Node, Operand],
    read: Container[fx.Node],
) -> Leaf:
    operands, slots = _operands(body), tuple(slot for slot in sorted(serves) if gradients[slot] in body)
    handed_on = [node for node in body if node in read]
    return Leaf(
        serves=serves,
        slots=slots,
        handed_on=tuple(sources[node].index for node in handed_on),
        module=_leaf_module(body, operands, [*(gradients[slot] for slot in slots), *handed_on]),
        flops=sum(map(known_flops, body)),
        operands=tuple(sources[operand] for operand in operands),
    )


def _leaf_module(
    body: Iterable[fx.Node], operands: Iterable[fx.Node], results: Iterable[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    twin = {operand: graph.placeholder(operand.name) for operand in operands}
    for node in body:
        twin[node] = graph.node_copy(node, twin.__getitem__)
    graph.output(tuple(twin[result] for result in results))
    free_strides(graph)
    return fx.GraphModule({}, graph)


def extract(backward: fx.GraphModule, outputs: Sequence[fx.Node | None]) -> Part:
    """What these outputs need of a backward graph, which after partitioning has no side effects.

    Sizes are inputs of every part: guards that Inductor keeps with code on the disk are on such inputs alone.
    """
    placeholders = backward.graph.find_nodes(op="placeholder")
    needed = ancestors(node for node in outputs if node is not None)
    needed |= {node for node in placeholders if isinstance(node.meta.get("val"), torch.SymInt)}
    graph = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in backward.graph.nodes:
        if node in needed:
            twin[node] = graph.node_copy(node, twin.__getitem__)
    result = graph.output(tuple(None if node is None else twin[node] for node in outputs))
    result.meta = dict(backward.graph.output_node().meta)
    read = tuple(index for index, node in enumerate(placeholders) if node in needed)
    return Part(fx.GraphModule(backward, graph), read)


def free_strides(graph: fx.Graph) -> None:
    """Let views be copies where strides ask for it: compiled code may lay its outputs out in its own way."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
