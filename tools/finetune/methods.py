"""What each method of fine-tuning trains: the best within the budget, everything, or the last blocks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from gtcompile.capture.model_io import unwrap
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.costs.budgets import budget_flops, smallest_budget, written_budget
from gtcompile.errors import BudgetError
from gtcompile.selection.selection import Selection
from gtcompile.state.trained_set import train_only
from gtcompile.tools.runs.settings import Settings
from gtcompile.training.adaptive import AdaptiveBackprop

Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is trained until the next plan, and what a step of it costs."""

    trained: frozenset[str]
    """FQNs."""
    selectable: int
    """How many parameters could be trained."""
    step_flops: int
    """FLOPs of one training step."""
    budget_flops: int
    """FLOPs one training step may take."""
    full_flops: int
    """FLOPs of one training step with everything trained."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Importance by FQN where it was measured."""
    importance_bound: float | None = None
    """No choice within the budget has a greater total importance."""

    def __str__(self) -> str:
        share = self.step_flops / self.full_flops
        return f"{len(self.trained)} of {self.selectable} parameters, {share:.1%} of a full step's FLOPs"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `selections.json`, parameters in order."""
        return {
            "trained": sorted(self.trained),
            "selectable": self.selectable,
            "step_flops": self.step_flops,
            "budget_flops": self.budget_flops,
            "full_flops": self.full_flops,
            "importance": dict(self.importance),
            "importance_bound": self.importance_bound,
        }


class Policy(Protocol):
    """Decides what is trained."""

    adapts: bool
    """Whether another plan can differ from the first."""

    def plan(self, batches: Sequence[Batch]) -> Plan:
        """Choose, and train that from now on."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Train what was trained when the state was taken."""


class AdaptivePolicy:
    """The best choice within the budget, measured anew for every plan."""

    adapts = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> None:
        self._adaptive = AdaptiveBackprop(model, optimizer, budget)

    def plan(self, batches: Sequence[Batch]) -> Plan:
        """Measure importance on these batches and train the best selection."""
        selection = self._adaptive.reselect(batches)
        return _plan_of(selection, self._adaptive.importance)

    def state_dict(self) -> dict[str, Any]:
        """The state of `AdaptiveBackprop`."""
        return self._adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the selection of the state."""
        self._adaptive.load_state_dict(state)


def _plan_of(selection: Selection, importance: Mapping[str, float]) -> Plan:
    return Plan(
        trained=selection.trained,
        selectable=selection.selectable,
        step_flops=selection.step_flops,
        budget_flops=selection.budget_flops,
        full_flops=selection.full_flops,
        importance=dict(importance),
        importance_bound=selection.importance_bound,
    )


class FixedPolicy:
    """Everything, or the last blocks that fit the budget; the same in every epoch."""

    adapts = False

    def __init__(self, model: nn.Module, *, budget: float | None) -> None:
        self._model, self._budget = model, budget

    def plan(self, batches: Sequence[Batch]) -> Plan:
        """Choose by the costs of a step with the first batch."""
        costs = backward_costs(self._model, batches[0])
        plan = fixed_plan(costs, costs.fqns, 1.0)
        if self._budget is not None:
            plan = fixed_plan(costs, last_blocks(unwrap(self._model), costs, self._budget), self._budget)
        train_only(self._model, plan.trained)
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the choice follows from the model."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore; the run trains the plan it saved."""


def fixed_plan(costs: BackwardCosts, trained: frozenset[str], budget: float) -> Plan:
    """A plan without importances."""
    return Plan(
        trained=trained,
        selectable=len(costs.fqns),
        step_flops=costs.step_flops(trained),
        budget_flops=budget_flops(costs.full_flops, budget),
        full_flops=costs.full_flops,
    )


def policy_for(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> Policy:
    """The policy of a run's method."""
    if settings.method == "adaptive":
        return AdaptivePolicy(model, optimizer, settings.budget)
    return FixedPolicy(model, budget=settings.budget if settings.method == "last-layers" else None)


def last_blocks(model: nn.Module, costs: BackwardCosts, budget: float) -> frozenset[str]:
    """The parameters of the last blocks whose training fits the budget together.

    A block is an element of an outermost `nn.ModuleList`; a model without any is cut into its single
    parameters. The last block is the one whose training alone costs least, since the backward stops there.

    Raises:
        BudgetError: not even one block fits; names the smallest budget that works.
    """
    blocks = sorted(_blocks(model, costs.fqns), key=costs.step_flops)
    if not blocks:
        blocks = sorted((frozenset({fqn}) for fqn in sorted(costs.fqns)), key=costs.step_flops)
    limit, chosen = budget_flops(costs.full_flops, budget), frozenset[str]()
    for block in blocks:
        if costs.step_flops(chosen | block) > limit:
            break
        chosen |= block
    if not chosen:
        least = costs.full_flops, costs.step_flops(blocks[0])
        raise BudgetError(
            f"budget {budget!r} does not hold the last block; the smallest that does is "
            f"{written_budget(*least)}",
            smallest_budget(*least),
        )
    return chosen


def _blocks(model: nn.Module, fqns: Iterable[str]) -> list[frozenset[str]]:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    prefixes = [f"{name}.{index}." for name in outermost for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
    blocks = [frozenset(fqn for fqn in fqns if fqn.startswith(prefix)) for prefix in prefixes]
    return [block for block in blocks if block]
