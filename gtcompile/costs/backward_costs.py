"""What training any set of parameters costs, read off the dependency graph.

A backward node runs exactly when a trained parameter needs it. So the cost of a trained set is the sum over
the nodes that one of its parameters needs: exact, with shared paths counted once.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gtcompile.capture.model_io import LossFunction
from gtcompile.costs.budgets import smallest_budget
from gtcompile.costs.dependency_graph import BACKWARD, capture_everything, dependencies
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph, Parameter, names_of


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Backward work that is done once if any of its parameters is trained."""

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
    """FLOPs per training step of what the loss needs, whatever is trained."""
    shared_work: tuple[SharedWork, ...]
    """The backward, one entry per distinct set of parameters, fewest parameters first."""
    follows_values: bool = False
    """Whether the forward branches on data: these are the costs of the branches that this batch takes."""

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

    def __repr__(self) -> str:
        return f"<BackwardCosts: {self}>"

    def __str__(self) -> str:
        full, forward = self.full_flops, self.forward_flops
        share = f"{forward / full:.1%}" if full else "all"
        branches = " on the branches this batch takes" if self.follows_values else ""
        selectable = f"{len(self.fqns)} selectable parameters"
        return f"{full:.4g} FLOPs a full step{branches}, {share} of them forward, {selectable}"


def backward_costs(model: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None) -> BackwardCosts:
    """The exact FLOPs of one training step of `model` for any trained set, at the shapes of one batch.

    A full step trains everything that was trainable when gtcompile first saw the model. What `train_only` has
    frozen since then can be selected; what the user froze cannot. Where the forward branches on data, the
    costs are those of the branches that this batch takes, which needs real weights.

    Args:
        model: returns its loss, unless there is a `loss_fn`; may be on the meta device, without weights.
        batch: the keyword dictionary of one batch of ordinary tensors, labels included; with `loss_fn`,
            anything it takes.
        loss_fn: from the model and the batch to the scalar loss; None if the model returns its loss, as a
            scalar or as `.loss`.

    Raises:
        CaptureError: the model could not be captured, or operators' FLOPs are unknown: names all of them.
        ValueError, TypeError: the batch does not fit the model's forward.
    """
    return costs_of(capture_everything(model, batch, loss_fn))


def costs_of(joint: JointGraph) -> BackwardCosts:
    """Read the costs off a joint graph.

    Raises:
        CaptureError: for matmul-like operators without a FLOP formula, or when no parameter has a gradient.
    """
    if not joint.live:
        raise CaptureError("no parameter receives a gradient: the loss depends on none that requires grad")
    forward_flops = 0
    backward: defaultdict[frozenset[str], int] = defaultdict(int)
    for _, node in dependencies(joint).nodes(data=True):
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
