"""The methods of fine-tuning: the best set within the budget, everything, or the last blocks that fit."""

from collections.abc import Iterable, Mapping, Sequence
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


class Method(Protocol):
    """Decides which parameters are trained."""

    adapts: bool
    """Whether a later selection can differ from the first."""

    @property
    def importance(self) -> Mapping[str, float]:
        """The importances of the last selection by FQN; empty if the method measures none."""

    def select(self, batches: Sequence[Batch]) -> Selection:
        """Choose a trained set, and train it from now on."""

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""


class AdaptiveMethod:
    """The best set within the budget; importance is measured for every selection."""

    adapts = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, budget: float) -> None:
        self._adaptive = AdaptiveBackprop(model, optimizer, budget)

    @property
    def importance(self) -> Mapping[str, float]:
        """The importances that the last selection measured, by FQN."""
        return self._adaptive.importance

    def select(self, batches: Sequence[Batch]) -> Selection:
        """Measure importance on these batches and train the best selection."""
        return self._adaptive.reselect(batches)

    def state_dict(self) -> dict[str, Any]:
        """The state of `AdaptiveBackprop`."""
        return self._adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the selection of the state."""
        self._adaptive.load_state_dict(state)


class FixedMethod:
    """Everything, or the last blocks that fit the budget; the same set in every epoch."""

    adapts = False

    def __init__(self, model: nn.Module, *, budget: float | None) -> None:
        self._model, self._budget = model, budget

    @property
    def importance(self) -> Mapping[str, float]:
        """Empty, since nothing is measured."""
        return {}

    def select(self, batches: Sequence[Batch]) -> Selection:
        """Choose by the costs of a step with the first batch."""
        costs = backward_costs(self._model, batches[0])
        trained = costs.fqns
        if self._budget is not None:
            trained = last_blocks(unwrap(self._model), costs, self._budget)
        train_only(self._model, trained)
        return Selection(
            trained=trained,
            selectable=len(costs.fqns),
            step_flops=costs.step_flops(trained),
            budget_flops=budget_flops(costs.full_flops, self._budget or 1.0),
            full_flops=costs.full_flops,
            importance=0.0,
            importance_bound=0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """An empty state, since the choice follows from the model."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the run trains the set that its folder holds."""


def method_for(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> Method:
    """The method that the settings name."""
    if settings.method == "adaptive":
        return AdaptiveMethod(model, optimizer, settings.budget)
    return FixedMethod(model, budget=settings.budget if settings.method == "last-layers" else None)


def selection_record(selection: Selection, importance: Mapping[str, float]) -> dict[str, Any]:
    """A selection as plain values for `selections.json`; without importances it has no bound."""
    return {
        "trained": sorted(selection.trained),
        "selectable": selection.selectable,
        "step_flops": selection.step_flops,
        "budget_flops": selection.budget_flops,
        "full_flops": selection.full_flops,
        "importance": dict(importance),
        "importance_bound": selection.importance_bound if importance else None,
    }


def last_blocks(model: nn.Module, costs: BackwardCosts, budget: float) -> frozenset[str]:
    """The parameters of the last blocks that fit the budget together.

    A block is an element of an outermost `nn.ModuleList`; in a model without any, every parameter is a block.
    The last block is the one whose training alone costs least, since the backward stops there.

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
            f"--budget {budget!r} is too small for the last block; the smallest that works is "
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
