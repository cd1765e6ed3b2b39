"""Why a node of the joint graph runs for a trained set or not, and what another trained set changes."""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from gtcompile.capture.capture import tangents
from gtcompile.costs.backward_costs import dependency_graph, parameters_needing, work_by_node
from gtcompile.graph.joint_graph import JointGraph, ancestors, names_of
from gtcompile.graph.names import near_names

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why one node runs or was eliminated."""

    subject: str
    """What was asked about: a node's name or an FQN."""
    node: str
    """The node; for a parameter the last that computes its gradient."""
    phase: Phase
    """The forward runs whatever is trained; a forward node is explained by what it is saved for."""
    alive: bool
    """Whether it runs for this trained set."""
    needed_by: frozenset[str]
    """Trained FQNs whose gradients read it. Freezing all of them eliminates a backward node, and lets a
    forward value go."""
    would_need: frozenset[str]
    """Frozen FQNs whose gradients would read it."""
    path: tuple[str, ...]
    """Node names from it to the gradient of `reached`, each read by the next; empty when nothing reads it."""
    reached: str | None
    """The parameter whose gradient the path ends in: trained where there is one, else frozen."""
    chain: tuple[str, ...]
    """Node names from the loss's tangent to it: what has to run before it; empty in the forward."""
    flops: int
    """Of the node itself, per training step."""
    freed_flops: Mapping[str, int]
    """By trained FQN in `needed_by`: FLOPs that a step loses when that one alone is frozen."""
    freed_together_flops: int
    """FLOPs that a step loses when all of `needed_by` are frozen."""

    def __str__(self) -> str:
        if self.phase == "forward":
            saved = (
                f"saved for {_count(self.needed_by, 'gradient')}"
                if self.needed_by
                else "not saved for backward"
            )
            return f"{self.node} runs in the forward, whatever is trained; {saved}"
        if not self.alive:
            served = _count(self.would_need, "parameter")
            return f"{self.node} is eliminated: it serves {served}, none of them trained"
        if not self.needed_by:
            return f"{self.node} runs for its side effect"
        return f"{self.node} runs for {_count(self.needed_by, 'trained parameter')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changes from one trained set to another."""

    entered: tuple[str, ...]
    """FQNs trained only afterwards, sorted."""
    left: tuple[str, ...]
    """FQNs trained only before, sorted."""
    gained_flops: int
    """FLOPs per training step of the nodes that appeared."""
    lost_flops: int
    """FLOPs per training step of the nodes that went."""
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
            f"{_count(self.appeared, 'node')} appeared, {len(self.gone)} went"
        )


def _count(things: Collection[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def explain(joint: JointGraph, subject: str, trained: Set[str]) -> Explanation:
    """Why a node, or the gradient of a parameter, is computed for a trained set or not.

    Args:
        joint: as captured, with every gradient live.
        subject: a node's name or an FQN (any name of a tied weight).
        trained: FQNs.

    Raises:
        ValueError: nothing is called that (names the nearest), the parameter has no gradient, or `trained`
            names a parameter without one.
    """
    _check_trained(joint, trained)
    node = _find(joint, subject)
    needing = parameters_needing(joint)
    if node in joint.forward_nodes() or node.op == "placeholder":
        needed, phase = _gradients_reading(joint, node, needing), "forward"
    else:
        needed, phase = needing[node], "backward"
    needed_by, would_need = needed & trained, needed - trained
    path, reached = _path(joint, node, needed_by or would_need)
    alive = phase == "forward" or bool(needed_by) or node in _kept_for_effects(joint)
    return Explanation(
        subject=subject,
        node=node.name,
        phase="forward" if phase == "forward" else "backward",
        alive=alive,
        needed_by=needed_by,
        would_need=would_need,
        path=path,
        reached=reached,
        chain=_chain(joint, node) if phase == "backward" else (),
        flops=work_by_node(joint).get(node, 0),
        freed_flops={fqn: _lost(joint, needing, trained, trained - {fqn}) for fqn in sorted(needed_by)},
        freed_together_flops=_lost(joint, needing, trained, trained - needed_by),
    )


def compare_trained_sets(joint: JointGraph, before: Set[str], after: Set[str]) -> Difference:
    """Parameters, FLOPs, saved bytes and nodes that come and go from one trained set to another.

    Raises:
        ValueError: a set names a parameter without a gradient.
    """
    for trained in (before, after):
        _check_trained(joint, trained)
    alive = [alive_backward_nodes(joint, trained) for trained in (before, after)]
    saved = [saved_values(joint, trained) for trained in (before, after)]
    needing = parameters_needing(joint)
    order = [node for node in joint.module.graph.nodes if node in alive[0] ^ alive[1]]
    return Difference(
        entered=tuple(sorted(after - before)),
        left=tuple(sorted(before - after)),
        gained_flops=_lost(joint, needing, after, before),
        lost_flops=_lost(joint, needing, before, after),
        gained_bytes=sum(size for key, size in saved[1].items() if key not in saved[0]),
        lost_bytes=sum(size for key, size in saved[0].items() if key not in saved[1]),
        appeared=tuple(node.name for node in order if node in alive[1]),
        gone=tuple(node.name for node in order if node in alive[0]),
    )


def alive_backward_nodes(joint: JointGraph, trained: Set[str]) -> frozenset[fx.Node]:
    """The backward nodes that run when exactly these parameters are trained."""
    forward, effects = joint.forward_nodes(), _kept_for_effects(joint)
    return frozenset(
        node
        for node, needed in parameters_needing(joint).items()
        if node not in forward and node.op != "placeholder" and (node in effects or needed & trained)
    )


def saved_bytes(joint: JointGraph, trained: Set[str]) -> int:
    """Bytes of forward values that the backward of a trained set reads, weights and batch not counted.

    What a partitioner starts from: it may recompute some of them instead, which takes less memory.
    """
    return sum(saved_values(joint, trained).values())


def saved_values(joint: JointGraph, trained: Set[str]) -> dict[int, int]:
    """Bytes by storage that the backward of a trained set reads of the forward; views count once."""
    forward = joint.forward_nodes()
    given = {_storage(node) for node in joint.module.graph.find_nodes(op="placeholder")}
    alive = alive_backward_nodes(joint, trained)
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
        gradients = _gradients(joint).get(fqns[subject])
        if not gradients:
            status = next(p.status for p in joint.parameters if p.fqn == fqns[subject])
            raise ValueError(f"{subject!r} has no gradient in this graph: it is {status}")
        return max(gradients)
    if subject not in nodes:
        raise ValueError(
            f"no parameter or node is called {subject!r}; {near_names(subject, [*fqns, *nodes])}"
        )
    return nodes[subject]


def _gradients(joint: JointGraph) -> dict[str, list[fx.Node]]:
    gradients: dict[str, list[fx.Node]] = {}
    for slot, node in zip(joint.slots, joint.gradients, strict=True):
        if slot is not None and node is not None:
            gradients.setdefault(slot, []).append(node)
    return gradients


def _gradients_reading(
    joint: JointGraph, node: fx.Node, needing: Mapping[fx.Node, frozenset[str]]
) -> frozenset[str]:
    """Parameters whose gradient reads a forward value itself, not through other forward values."""
    forward = joint.forward_nodes()
    readers = [user for user in node.users if user not in forward and user in needing]
    return frozenset().union(*(needing[user] for user in readers))


def _path(joint: JointGraph, node: fx.Node, fqns: frozenset[str]) -> tuple[tuple[str, ...], str | None]:
    """The shortest way from a node through the backward to a gradient of one of these parameters."""
    ends = {gradient: fqn for fqn, found in _gradients(joint).items() if fqn in fqns for gradient in found}
    graph, forward = dependency_graph(joint), joint.forward_nodes()
    inside = graph.subgraph(n for n in graph if n is node or n not in forward)
    ways = nx.single_source_shortest_path(inside, node)
    reached = min(
        (end for end in ends if end in ways), key=lambda end: (len(ways[end]), end.name), default=None
    )
    if reached is None:
        return (), None
    return tuple(n.name for n in ways[reached]), ends[reached]


def _chain(joint: JointGraph, node: fx.Node) -> tuple[str, ...]:
    graph = dependency_graph(joint)
    for tangent in tangents(joint):
        if nx.has_path(graph, tangent, node):
            return tuple(n.name for n in nx.shortest_path(graph, tangent, node))
    return ()


def _kept_for_effects(joint: JointGraph) -> frozenset[fx.Node]:
    return ancestors(n for n in joint.module.graph.nodes if n.op == "call_function" and n.is_impure())


def _lost(
    joint: JointGraph, needing: Mapping[fx.Node, frozenset[str]], before: Set[str], after: Set[str]
) -> int:
    """FLOPs of backward nodes that run before and not afterwards."""
    forward, work = joint.forward_nodes(), work_by_node(joint)
    backward = ((needing[node], flops) for node, flops in work.items() if flops and node not in forward)
    return sum(f for needed, f in backward if needed & before and not needed & after)
