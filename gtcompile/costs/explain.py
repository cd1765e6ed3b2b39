"""Explain why a joint-graph node runs or not for a trained set, and compare two trained sets."""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from gtcompile.costs.dependency_graph import (
    BACKWARD,
    FORWARD,
    TANGENT,
    dependencies,
    dependencies_with_costs,
)
from gtcompile.graph.joint_graph import JointGraph, ancestors, names_of
from gtcompile.graph.names import near_names

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why one node runs, or is eliminated."""

    subject: str
    """The node name or FQN that `explain` was called with."""
    node: str
    """Name of the node. For a parameter: the node that computes its gradient."""
    phase: Phase
    """Phase of the node. A forward node always runs; its explanation says what it is saved for."""
    alive: bool
    """Whether it runs for this trained set."""
    needed_by: frozenset[str]
    """FQNs of trained parameters whose gradients need it: depend on a backward node, or read a forward value
    directly in the backward. Freezing all of them eliminates the node, or no longer saves the value."""
    would_need: frozenset[str]
    """FQNs of frozen parameters whose gradients would need it."""
    path: tuple[str, ...]
    """Node names on the shortest path from it to the gradient of `reached`; empty if there is none."""
    reached: str | None
    """FQN of the parameter whose gradient ends the path: a trained one if possible, else a frozen one."""
    chain: tuple[str, ...]
    """Node names on the shortest path from the gradient of the loss to a backward node; else empty."""
    flops: int
    """FLOPs of the node itself, per training step."""
    freed_flops: Mapping[str, int]
    """For each FQN in `needed_by`: FLOPs per training step saved by freezing it alone."""
    freed_together_flops: int
    """FLOPs per training step saved by freezing all of `needed_by`."""

    def __str__(self) -> str:
        if self.phase == "forward":
            saved = (
                f"saved for {_count(self.needed_by, 'gradient')}"
                if self.needed_by
                else "not saved for backward"
            )
            return f"{self.node} runs in the forward of every step; {saved}"
        if not self.alive:
            frozen = _count(self.would_need, "frozen parameter")
            return f"{self.node} is eliminated: {frozen} and no trained one would need it"
        if not self.needed_by:
            return f"{self.node} runs for its side effect"
        return f"{self.node} runs for {_count(self.needed_by, 'trained parameter')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference between two trained sets."""

    entered: tuple[str, ...]
    """FQNs trained only afterwards, sorted."""
    left: tuple[str, ...]
    """FQNs trained only before, sorted."""
    gained_flops: int
    """FLOPs per training step of the nodes that appeared."""
    lost_flops: int
    """FLOPs per training step of the nodes that disappeared."""
    gained_bytes: int
    """Bytes saved for backward only afterwards."""
    lost_bytes: int
    """Bytes saved for backward only before."""
    appeared: tuple[str, ...]
    """Names of backward nodes that run only afterwards, in graph order."""
    gone: tuple[str, ...]
    """Names of backward nodes that ran only before, in graph order."""

    def __str__(self) -> str:
        return (
            f"{_count(self.entered, 'parameter')} in, {len(self.left)} out; "
            f"+{self.gained_flops:.4g} and -{self.lost_flops:.4g} FLOPs; "
            f"{_count(self.appeared, 'node')} appeared, {len(self.gone)} disappeared"
        )


def _count(things: Collection[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def explain(joint: JointGraph, subject: str, trained: Set[str]) -> Explanation:
    """Explain why a node, or the gradient of a parameter, is computed or not for a trained set.

    Args:
        joint: as captured, with every gradient live.
        subject: a node's name or an FQN (any name of a tied weight).
        trained: FQNs of the trained parameters.

    Raises:
        ValueError: no node or parameter has this name (the message lists the nearest), the parameter has no
            gradient, or `trained` contains a parameter without gradient.
    """
    _check_trained(joint, trained)
    node, graph = _find(joint, subject), dependencies(joint)
    name = node.name
    forward = graph.nodes[name]["direction"] == FORWARD or node.op == "placeholder"
    needed = _gradients_reading(graph, name) if forward else graph.nodes[name]["parameters"]
    needed_by, would_need = needed & trained, needed - trained
    path, reached = _path(graph, name, needed_by or would_need)
    return Explanation(
        subject=subject,
        node=name,
        phase="forward" if forward else "backward",
        alive=forward or bool(needed_by) or node in _kept_for_effects(joint),
        needed_by=needed_by,
        would_need=would_need,
        path=path,
        reached=reached,
        chain=() if forward else _chain(graph, name),
        flops=graph.nodes[name]["flops"],
        freed_flops={fqn: _lost(graph, trained, trained - {fqn}) for fqn in sorted(needed_by)},
        freed_together_flops=_lost(graph, trained, trained - needed_by),
    )


def compare_trained_sets(joint: JointGraph, before: Set[str], after: Set[str]) -> Difference:
    """List the differences in parameters, FLOPs, saved bytes and nodes between two trained sets.

    Raises:
        ValueError: a set contains a parameter without gradient.
    """
    for trained in (before, after):
        _check_trained(joint, trained)
    graph = dependencies_with_costs(joint)
    alive = [_alive(joint, graph, trained) for trained in (before, after)]
    saved = [_saved(joint, graph, trained) for trained in (before, after)]
    changed = [node for node in joint.module.graph.nodes if node in alive[0] ^ alive[1]]
    return Difference(
        entered=tuple(sorted(after - before)),
        left=tuple(sorted(before - after)),
        gained_flops=_lost(graph, after, before),
        lost_flops=_lost(graph, before, after),
        gained_bytes=sum(size for key, size in saved[1].items() if key not in saved[0]),
        lost_bytes=sum(size for key, size in saved[0].items() if key not in saved[1]),
        appeared=tuple(node.name for node in changed if node in alive[1]),
        gone=tuple(node.name for node in changed if node in alive[0]),
    )


def alive_backward_nodes(joint: JointGraph, trained: Set[str]) -> frozenset[fx.Node]:
    """Return the backward nodes that run if exactly these parameters are trained."""
    return _alive(joint, dependencies_with_costs(joint), trained)


def saved_bytes(joint: JointGraph, trained: Set[str]) -> int:
    """Return the bytes of forward values that the backward reads, without weights and batch.

    A partitioner may save fewer bytes, because it recomputes some of these values.
    """
    return sum(_saved(joint, dependencies_with_costs(joint), trained).values())


def _alive(joint: JointGraph, graph: "nx.DiGraph[str]", trained: Set[str]) -> frozenset[fx.Node]:
    effects = _kept_for_effects(joint)
    return frozenset(
        node
        for node in joint.module.graph.nodes
        if node.op not in ("placeholder", "output")
        and graph.nodes[node.name]["direction"] == BACKWARD
        and (node in effects or graph.nodes[node.name]["parameters"] & trained)
    )


def _saved(joint: JointGraph, graph: "nx.DiGraph[str]", trained: Set[str]) -> dict[int, int]:
    forward = joint.forward_nodes()
    given = {_storage(node) for node in joint.module.graph.find_nodes(op="placeholder")}
    alive = _alive(joint, graph, trained)
    read = {source for node in alive for source in node.all_input_nodes if source in forward}
    values = {_storage(node): node.meta["val"] for node in read if node.op != "placeholder"}
    return {
        key: value.untyped_storage().nbytes()
        for key, value in values.items()
        if key is not None and key not in given
    }


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _check_trained(joint: JointGraph, trained: Set[str]) -> None:
    if unknown := sorted(trained - joint.live):
        raise ValueError(
            f"{unknown[0]!r} has no gradient to train; {near_names(unknown[0], sorted(joint.live))}"
        )


def _find(joint: JointGraph, subject: str) -> fx.Node:
    fqns = names_of(joint.parameters)
    nodes: dict[str, fx.Node] = {n.name: n for n in joint.module.graph.nodes if n.op != "output"}
    if subject in fqns:
        slots = zip(joint.slots, joint.gradients, strict=True)
        gradients = [node for slot, node in slots if slot == fqns[subject] and node is not None]
        if not gradients:
            status = next(p.status for p in joint.parameters if p.fqn == fqns[subject])
            raise ValueError(f"{subject!r} has no gradient in this graph: it is {status}")
        return max(gradients)
    if subject not in nodes:
        raise ValueError(
            f"no parameter or node is called {subject!r}; {near_names(subject, [*fqns, *nodes])}"
        )
    return nodes[subject]


def _gradients_reading(graph: "nx.DiGraph[str]", name: str) -> frozenset[str]:
    """Return the parameters whose backward reads a forward value directly, not through forward nodes."""
    readers = (graph.nodes[reader] for reader in graph.successors(name))
    return frozenset().union(*(node["parameters"] for node in readers if node["direction"] == BACKWARD))


def _path(graph: "nx.DiGraph[str]", name: str, fqns: Set[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the shortest path from a node through backward nodes to the gradient of one of these FQNs."""
    backward = graph.subgraph(n for n, node in graph.nodes(data="direction") if n == name or node == BACKWARD)
    paths = nx.single_source_shortest_path(backward, name)
    ends = [end for end in paths if graph.nodes[end]["gradient_of"] in fqns]
    if not ends:
        return (), None
    nearest = min(ends, key=lambda end: (len(paths[end]), end))
    return tuple(paths[nearest]), graph.nodes[nearest]["gradient_of"]


def _chain(graph: "nx.DiGraph[str]", name: str) -> tuple[str, ...]:
    """Return the shortest path to a node from the first tangent that it depends on."""
    for start, operator in graph.nodes(data="operator"):
        if operator == TANGENT and nx.has_path(graph, start, name):
            return tuple(nx.shortest_path(graph, start, name))
    return ()


def _kept_for_effects(joint: JointGraph) -> frozenset[fx.Node]:
    return ancestors(n for n in joint.module.graph.nodes if n.op == "call_function" and n.is_impure())


def _lost(graph: "nx.DiGraph[str]", before: Set[str], after: Set[str]) -> int:
    """Return the FLOPs of the backward nodes that run before and not after."""
    return sum(
        node["flops"]
        for _, node in graph.nodes(data=True)
        if node["flops"]
        and node["direction"] == BACKWARD
        and node["parameters"] & before
        and not node["parameters"] & after
    )
