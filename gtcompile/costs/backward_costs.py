"""FLOPs of training any set of parameters, computed from the dependency graph.

A backward node runs if and only if a trained parameter needs it. So the cost of a trained set is the sum over
the nodes that at least one of its parameters needs. This is exact, and counts shared paths once.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gtcompile.capture.model_io import LossFunction
from gtcompile.costs.budgets import smallest_budget
from gtcompile.costs.dependency_graph import BACKWARD, capture_everything, dependencies_with_costs
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph, Parameter, names_of
from gtcompile.graph.names import refuse_string


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Backward work that is done once if at least one of its parameters is trained."""

    flops: int
    """FLOPs per training step."""
    parameters: frozenset[str]
    """FQNs whose gradients need this work."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BackwardCosts:
    """FLOPs of one training step for any set of trained parameters, at the captured shapes."""

    parameters: tuple[Parameter, ...]
    """Every parameter of the model; those with status `selectable` can be trained."""
    forward_flops: int
    """FLOPs per training step of the forward, which every trained set needs."""
    shared_work: tuple[SharedWork, ...]
    """The backward work, one entry per distinct set of parameters; small sets first."""
    follows_values: bool = False
    """Whether the forward branches on data. Costs then hold for the branches of the captured batch."""

    @property
    def fqns(self) -> frozenset[str]:
        """FQNs of the selectable parameters."""
        return frozenset(p.fqn for p in self.parameters if p.status == "selectable")

    @property
    def names(self) -> dict[str, str]:
        """From each name of each selectable parameter, aliases of tied weights included, to its FQN."""
        return names_of(p for p in self.parameters if p.status == "selectable")

    @property
    def full_flops(self) -> int:
        """FLOPs per training step if all selectable parameters are trained."""
        return self.forward_flops + sum(work.flops for work in self.shared_work)

    def step_flops(self, trained: Iterable[str]) -> int:
        """Return the FLOPs per training step if exactly these parameters are trained.

        Args:
            trained: FQNs, or aliases of tied weights.

        Raises:
            TypeError: `trained` is a single string.
            ValueError: a name is not that of a selectable parameter.
        """
        chosen = self._canonical(trained)
        return self.forward_flops + sum(
            w.flops for w in self.shared_work if not w.parameters.isdisjoint(chosen)
        )

    def marginal_flops(self, fqn: str, given: Iterable[str]) -> int:
        """Return the FLOPs per training step that `fqn` adds to a step that trains `given`."""
        given = frozenset(given)
        return self.step_flops(given | {fqn}) - self.step_flops(given)

    @property
    def minimum_budget_fraction(self) -> float:
        """The smallest budget that trains anything, in (0, 1]."""
        return smallest_budget(self.full_flops, self.cheapest_step_flops)

    @property
    def cheapest_step_flops(self) -> int:
        """FLOPs per training step if only the cheapest parameter is trained."""
        return min(self.step_flops({fqn}) for fqn in self.fqns)

    def _canonical(self, names: Iterable[str]) -> frozenset[str]:
        refuse_string(names)
        known, names = self.names, list(names)
        unknown = sorted(name for name in names if name not in known)
        if unknown:
            raise ValueError(f"no selectable parameter is called {', '.join(map(repr, unknown))}")
        return frozenset(known[name] for name in names)

    def __repr__(self) -> str:
        return f"<BackwardCosts: {self}>"

    def __str__(self) -> str:
        full, forward = self.full_flops, self.forward_flops
        share = f"{forward / full:.1%}" if full else "all"
        branches = " on the branches this batch takes" if self.follows_values else ""
        selectable = f"{len(self.fqns)} selectable parameters"
        return f"{full:.4g} FLOPs a full step{branches}, {share} of them forward, {selectable}"


def backward_costs(model: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None) -> BackwardCosts:
    """Compute the exact FLOPs of one training step for any trained set, at the shapes of one batch.

    A full step trains everything that was trainable when gtcompile first saw the model. Parameters frozen by
    `train_only` are selectable; parameters frozen by the user are not. If the forward branches on data, the
    costs hold for the branches that this batch takes, and real weights are required.

    Args:
        model: returns its loss, unless there is a `loss_fn`; may be on the meta device, without weights.
        batch: the keyword dictionary of one batch of ordinary tensors, labels included; with `loss_fn`,
            anything it takes.
        loss_fn: from the model and the batch to the scalar loss; None if the model returns its loss, as a
            scalar or as `.loss`.

    Returns:
        FLOPs per training step, 2 per multiply-add.

    Raises:
        CaptureError: the model cannot be captured, or operators without formula do matmul-like work; the
            message lists all of them.
        ValueError, TypeError: the batch does not fit the model's forward.
    """
    return costs_of(capture_everything(model, batch, loss_fn))


def costs_of(joint: JointGraph) -> BackwardCosts:
    """Compute the costs from a joint graph with every gradient live.

    Raises:
        CaptureError: a matmul-like operator has no FLOP formula, or no parameter has a gradient.
    """
    if not joint.live:
        raise CaptureError("no parameter receives a gradient: the loss depends on none that requires grad")
    forward_flops = 0
    backward: defaultdict[frozenset[str], int] = defaultdict(int)
    for _, node in dependencies_with_costs(joint).nodes(data=True):
        if node["direction"] == BACKWARD:
            backward[node["parameters"]] += node["flops"]
        else:
            forward_flops += node["flops"]
    return BackwardCosts(
        parameters=joint.parameters,
        forward_flops=forward_flops,
        shared_work=_in_order(backward),
        follows_values=joint.follows_values,
    )


def _in_order(backward: Mapping[frozenset[str], int]) -> tuple[SharedWork, ...]:
    works = [SharedWork(flops, parameters) for parameters, flops in backward.items() if flops and parameters]
    return tuple(sorted(works, key=lambda work: (len(work.parameters), sorted(work.parameters))))
