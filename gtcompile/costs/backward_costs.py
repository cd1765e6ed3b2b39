"""What every set of trained parameters costs: networkx reachability over the joint graph.

A backward node runs exactly when some trained parameter's gradient is reachable from it. So each node belongs
to the set of parameters that need it, and the cost of a trained set is the sum over the nodes whose set it
meets: exact, shared paths counted once.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import networkx as nx
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.capture.model_io import unwrap
from gtcompile.costs.budgets import smallest_budget
from gtcompile.errors import CaptureError
from gtcompile.graph.flops import node_flops, output_flops, register_missing_formulas
from gtcompile.graph.joint_graph import FORCED_GRADIENTS, JointGraph, Parameter, names_of
from gtcompile.state.restore import everything_trainable


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Backward work that is done, once, if any of its parameters is trained."""

    flops: int
    """FLOPs per training step."""
    parameters: frozenset[str]
    """FQNs whose gradients need this work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardCosts:
    """FLOPs of one training step for any set of trained parameters, at the captured shapes."""

    parameters: tuple[Parameter, ...]
    """Every parameter of the model; those with status `selectable` can be trained."""
    forward_flops: int
    """FLOPs per training step of what the loss needs, whatever is trained."""
    shared_work: tuple[SharedWork, ...]
    """The backward, one entry per distinct set of parameters, fewest parameters first."""
    follows_values: bool = False
    """Whether the forward branches on data, and these are the costs of the way that this batch takes."""

    @property
    def fqns(self) -> frozenset[str]:
        """The selectable parameters."""
        return frozenset(p.fqn for p in self.parameters if p.status == "selectable")

    @property
    def names(self) -> dict[str, str]:
        """From every name of the selectable parameters, aliases of tied weights included, to the FQN."""
        return names_of(p for p in self.parameters if p.status == "selectable")

    @property
    def full_flops(self) -> int:
        """FLOPs per training step with everything trained."""
        return self.forward_flops + sum(work.flops for work in self.shared_work)

    def step_flops(self, trained: Iterable[str]) -> int:
        """FLOPs per training step when exactly these parameters are trained.

        Args:
            trained: FQNs; any name of a tied weight stands for it.

        Raises:
            ValueError: for a name that is no parameter with a gradient.
        """
        chosen = self._canonical(trained)
        return self.forward_flops + sum(
            w.flops for w in self.shared_work if not w.parameters.isdisjoint(chosen)
        )

    def marginal_flops(self, fqn: str, given: Iterable[str]) -> int:
        """FLOPs per training step that training `fqn` adds when `given` is trained already."""
        given = frozenset(given)
        return self.step_flops(given | {fqn}) - self.step_flops(given)

    @property
    def minimum_budget_fraction(self) -> float:
        """The smallest budget that trains anything, in (0, 1]."""
        return smallest_budget(self.full_flops, self.cheapest_step_flops)

    @property
    def cheapest_step_flops(self) -> int:
        """FLOPs per training step when the one parameter is trained that costs least."""
        return min(self.step_flops({fqn}) for fqn in self.fqns)

    def _canonical(self, names: Iterable[str]) -> frozenset[str]:
        if isinstance(names, str):
            raise TypeError(f"expected a set of parameter names, got the string {names!r}")
        known, names = self.names, list(names)
        unknown = sorted(name for name in names if name not in known)
        if unknown:
            raise ValueError(f"no selectable parameter is called {', '.join(map(repr, unknown))}")
        return frozenset(known[name] for name in names)

    def __str__(self) -> str:
        full, forward = self.full_flops, self.forward_flops
        share = f"{forward / full:.1%}" if full else "all"
        way = ", the way this batch takes" if self.follows_values else ""
        selectable = f"{len(self.fqns)} selectable parameters"
        return f"{full:.4g} FLOPs a full step{way}, {share} of them forward, {selectable}"


def backward_costs(model: nn.Module, example_inputs: Mapping[str, Any]) -> BackwardCosts:
    """The exact FLOPs of one training step of `model` for any trained set, at the shapes of one batch.

    Whatever `train_only` has frozen by now is part of a full step and can be selected; what the user froze is
    not. Where the forward branches on data they are the costs of the way that this batch takes, which needs
    real weights.

    Args:
        model: returns its scalar loss or an output with `.loss`; may be on the meta device, without weights.
        example_inputs: keyword dictionary of one batch of ordinary tensors, labels included.

    Raises:
        CaptureError: the model could not be captured, or an operator's FLOPs are unknown.
        ValueError, TypeError: the batch does not fit the model's forward.
    """
    with everything_trainable(unwrap(model)):
        return costs_of(capture(model, example_inputs))


def costs_of(joint: JointGraph) -> BackwardCosts:
    """Read the costs off a joint graph.

    Raises:
        CaptureError: for a matmul-like operator without a FLOP formula, or when no parameter has a gradient.
    """
    if not joint.live:
        raise CaptureError("no parameter receives a gradient: the loss depends on none that asks for one")
    register_missing_formulas()
    needed_by = parameters_needing(joint)
    forward = joint.forward_nodes()
    forward_flops = 0
    backward: defaultdict[frozenset[str], int] = defaultdict(int)
    for node, flops in _work(joint):
        if node in forward:
            forward_flops += flops
        elif flops:
            backward[needed_by[node]] += flops
    return BackwardCosts(
        parameters=joint.parameters,
        forward_flops=forward_flops,
        shared_work=_in_order(backward),
        follows_values=joint.follows_values,
    )


def dependency_graph(joint: JointGraph) -> "nx.DiGraph[fx.Node]":
    """Data flow of a joint graph: an edge from each node to every node that reads it."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from(joint.module.graph.nodes)
    graph.add_edges_from(
        (source, node) for node in joint.module.graph.nodes for source in node.all_input_nodes
    )
    graph.remove_node(joint.module.graph.output_node())
    return graph


def parameters_needing(joint: JointGraph) -> dict[fx.Node, frozenset[str]]:
    """Per node the parameters whose gradient cannot be computed without it.

    Activations that the model itself has ask for a gradient get one with every parameter's.
    """
    graph = dependency_graph(joint)
    names = sorted(joint.live)
    bit = {name: 1 << index for index, name in enumerate(names)}
    bit[FORCED_GRADIENTS] = (1 << len(names)) - 1
    needed = dict.fromkeys(graph, 0)
    for slot, gradient in zip(joint.slots, joint.gradients, strict=True):
        if slot is not None and gradient is not None:
            needed[gradient] |= bit[slot]
    for node in reversed(list(nx.topological_sort(graph))):
        for reader in graph.successors(node):
            needed[node] |= needed[reader]
    sets = {mask: frozenset(name for name in names if bit[name] & mask) for mask in set(needed.values())}
    return {node: sets[mask] for node, mask in needed.items()}


def _work(joint: JointGraph) -> Iterable[tuple[fx.Node, int]]:
    """Each piece of work and the node whose readers decide whether it is done.

    A masked backward operator does the work of each output for those who read that output.
    """
    for node in joint.module.graph.nodes:
        if node.op != "call_function":
            continue
        by_output = output_flops(node)
        if not by_output:
            yield node, node_flops(node)
        for user in node.users if by_output else ():
            assert user.target is getitem
            yield user, by_output.get(user.args[1], 0)


def work_by_node(joint: JointGraph) -> dict[fx.Node, int]:
    """FLOPs per training step by node; those of a masked backward operator stand at its outputs.

    Raises:
        CaptureError: for a matmul-like operator without a FLOP formula.
    """
    work: defaultdict[fx.Node, int] = defaultdict(int)
    for node, flops in _work(joint):
        work[node] += flops
    return dict(work)


def _in_order(backward: Mapping[frozenset[str], int]) -> tuple[SharedWork, ...]:
    works = [SharedWork(flops, parameters) for parameters, flops in backward.items() if parameters]
    return tuple(sorted(works, key=lambda work: (len(work.parameters), sorted(work.parameters))))
