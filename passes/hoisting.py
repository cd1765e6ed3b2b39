"""Move weight gradients out of a backward graph, so that one compilation serves every trained set.

Weight gradients are leaves of the backward graph: no other node reads them. The rest is the *chain* of
activation gradients. It is compiled once, and also returns the operands of the leaves. A leaf runs only if
its parameter is trained.
"""

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx

from gtcompile.graph.flops import has_flops, planning_flops
from gtcompile.graph.joint_graph import ancestors
from gtcompile.passes.contract import graph_split
from gtcompile.passes.free_strides import free_strides

aten = torch.ops.aten

SCATTERS = frozenset(
    {
        aten.embedding_dense_backward.default,
        aten.index_put.default,
        aten._unsafe_index_put.default,
        aten.scatter_add.default,
        aten.index_add.default,
    }
)
"""Operators without FLOPs that are worth hoisting: their result is as large as the parameter."""


@dataclass(frozen=True, slots=True)
class Operand:
    """The source of one input of a leaf."""

    saved: bool
    """True for an input of the backward graph, False for a computed value."""
    index: int
    """Position among the backward graph's inputs, or among the computed values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """Computes a weight gradient, or values that several leaves need and the chain does not."""

    serves: frozenset[int]
    """Slots whose gradients need this leaf."""
    slots: tuple[int, ...]
    """Slots whose gradients this leaf itself returns."""
    handed_on: tuple[int, ...]
    """Results that other leaves read, as positions among the computed values."""
    module: fx.GraphModule
    """Takes `operands`; returns the gradients of `slots`, then the values of `handed_on`."""
    flops: int
    """FLOPs of running it once."""
    operands: tuple[Operand, ...]
    """Sources of the inputs of `module`, in order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A subgraph of a backward graph that can run by itself."""

    module: fx.GraphModule
    """Takes only the inputs that it reads, and symbolic sizes; returns a tuple."""
    inputs: tuple[int, ...]
    """Positions of its inputs among the backward graph's inputs."""

    @property
    def modules(self) -> tuple[fx.GraphModule, ...]:
        """The one graph."""
        return (self.module,)

    @property
    def finished(self) -> tuple[int, ...]:
        """Empty: a part returns any nodes, not only gradients."""
        return ()

    @property
    def flops(self) -> int:
        """FLOPs of running it once."""
        return sum(planning_flops(node) for node in self.module.graph.nodes if node.op == "call_function")


@dataclass(frozen=True, slots=True, kw_only=True)
class HoistedBackward:
    """A backward graph in two parts: the chain, which is compiled, and the leaves, which run on demand."""

    chain: Part
    """Returns the first computed values: the gradients of `chain_slots`, then operands of the leaves."""
    chain_slots: tuple[int, ...]
    """Slots that the chain computes: gradients of activations, and of parameters too cheap to hoist."""
    leaves: tuple[Leaf, ...]
    """In an order in which the operands of every leaf are computed before it runs."""

    @property
    def handed_on(self) -> int:
        """Number of computed values that the leaves add to those of the chain."""
        return sum(len(leaf.handed_on) for leaf in self.leaves)

    @property
    def computed(self) -> int:
        """Number of computed values: those of the chain, then those of the leaves."""
        outputs: Any = self.chain.module.graph.output_node().args[0]
        return len(outputs) + self.handed_on

    @property
    def modules(self) -> tuple[fx.GraphModule, ...]:
        """The graphs of the chain and of the leaves."""
        return (self.chain.module, *(leaf.module for leaf in self.leaves))

    @property
    def finished(self) -> tuple[int, ...]:
        """Slots whose gradients the chain and the leaves compute."""
        return (*self.chain_slots, *chain.from_iterable(leaf.slots for leaf in self.leaves))

    def __str__(self) -> str:
        size = len(self.chain.module.graph.nodes)
        return f"chain of {size} nodes with {len(self.chain_slots)} slots, {len(self.leaves)} leaves"


@graph_split
def hoist_weight_gradients(backward: fx.GraphModule, keep: Set[int], hoist: Set[int]) -> HoistedBackward:
    """Split a backward graph into the chain and its leaves.

    Before: `dx = mm(dy, w); dw = mm(t(dy), x); return (dx, dw)`
    After:  chain `dx = mm(dy, w); return (dx, dy)`, leaf of slot 1 `(dy, x) -> mm(t(dy), x)`

    Sound because the chain needs no node of a leaf, and the nodes of a leaf read the values that they read in
    the whole graph. Nodes that several leaves need, but no kept slot, become a leaf of their own that runs
    first. An example is the gradient of attention scores if the keys come from another module.

    Args:
        backward: a backward graph from the partitioner. It does not change.
        keep: slots that the chain must compute. If empty, the chain computes nodes that several slots need.
        hoist: slots that may become leaves. A slot without matrix products or scatters stays in the chain.
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
        chain=_extract(backward, handed_out),
        chain_slots=chain_slots,
        leaves=tuple(_leaf(serves, body, finished, sources, read) for serves, body in bodies.items()),
    )


def leaf_nodes(graph: fx.Graph, keep: Set[int], hoist: Set[int]) -> dict[frozenset[int], list[fx.Node]]:
    """Find the nodes that can run on demand: matrix products, scatters, and nodes computed from them.

    If `keep` is empty, nodes that several slots need belong to the chain.

    Returns:
        The nodes by the set of slots that need them, largest sets first.
    """
    serves = _served_slots(graph, keep | hoist)
    movable = {
        node: slots
        for node, slots in serves.items()
        if node.op == "call_function" and (slots.isdisjoint(keep) if keep else len(slots) == 1)
    }
    body = {node for node in movable if node.target in SCATTERS or has_flops(node)}
    for node in movable:
        if any(source in body for source in node.all_input_nodes):
            body.add(node)
    bodies: dict[frozenset[int], list[fx.Node]] = {}
    for node in movable:
        if node in body:
            bodies.setdefault(serves[node], []).append(node)
    return dict(sorted(bodies.items(), key=lambda item: (-len(item[0]), sorted(item[0]))))


def _served_slots(graph: fx.Graph, slots: Set[int]) -> dict[fx.Node, frozenset[int]]:
    """Return for each node, in graph order, the slots that need it. Unneeded nodes are left out."""
    output = graph.output_node()
    gradients: Any = output.args[0]
    serves: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(graph.nodes):
        own = (slot for slot in slots if gradients[slot] is node) if output in node.users else ()
        if needed := frozenset(own).union(*(serves.get(user, ()) for user in node.users)):
            serves[node] = needed
    return dict(reversed(serves.items()))


def _operands(body: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Return the nodes outside `body` that it reads, in order."""
    inside = set(body)
    return dict.fromkeys(i for node in body for i in node.all_input_nodes if i not in inside)


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
        flops=sum(map(planning_flops, body)),
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
    return free_strides(fx.GraphModule({}, graph))


@graph_split
def extract(backward: fx.GraphModule, outputs: Sequence[fx.Node | None]) -> Part:
    """Copy some nodes, and everything they depend on, into a new graph.

    Before: `dx = mm(dy, w); dw = mm(t(dy), x); return (dx, dw)`
    After, with the outputs (None, dw): `(dy, x) -> dw = mm(t(dy), x); return (None, dw)`

    Sound because the partitioner refuses a backward that writes to its inputs, so it has no side effects. All
    symbolic sizes stay inputs of the part, even if it does not read them, because guards in Inductor's disk
    cache refer to such inputs.

    Args:
        backward: the whole backward graph. It does not change.
        outputs: nodes that the part returns, in order. None stays None.
    """
    return _extract(backward, outputs)


def _extract(backward: fx.GraphModule, outputs: Sequence[fx.Node | None]) -> Part:
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
