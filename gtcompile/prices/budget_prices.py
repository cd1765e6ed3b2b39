"""What steps take of the resources that a training has budgets of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction
from gtcompile.costs.backward_costs import BackwardCosts
from gtcompile.costs.prices import Price, SharedAmount
from gtcompile.prices.step_prices import memory_price
from gtcompile.prices.step_timing import MeasuredRates, measure_rates
from gtcompile.selection.limits import Terms
from gtcompile.state.optimizer_state import Setting


class BudgetPrices:
    """Prices a training's steps in seconds and bytes, as far as there are budgets of them.

    Args:
        model: that is trained.
        optimizer: the one that trains it.
        loss_fn: as for `backward_costs`.
        frozen_state: what happens to the optimizer's state of frozen parameters.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_fn: LossFunction | None, frozen_state: Setting
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._frozen_state = frozen_state
        self._rates: MeasuredRates | None = None

    def seconds(self, batch: Any, timed: BackwardCosts, costs: BackwardCosts) -> Price:
        """Return the nanoseconds of steps; steps are timed once for each full step's FLOPs.

        Args:
            batch: to time steps on.
            timed: costs at the shapes of this batch.
            costs: of the steps to be priced.
        """
        if self._rates is None or self._rates.full_flops != timed.full_flops:
            rates = measure_rates(self._model, self._optimizer, batch, timed, self._loss_fn)
            self._rates = MeasuredRates(timed.full_flops, rates)
        return self._rates.rates.price(costs)

    def bytes(self, saved: Sequence[SharedAmount], cache_bytes: int) -> Price:
        """Return the bytes that training takes beside the weights.

        Args:
            saved: for the backward.
            cache_bytes: that a prefix cache may take of the memory in which the model is.
        """
        return memory_price(self._model, self._optimizer, saved, self._frozen_state, cache_bytes)

    def state(self, terms: Terms) -> dict[str, Any]:
        """The budgets and what was measured for them, as JSON types; empty without any."""
        if not terms.needs_prices:
            return {}
        return {
            "budget_seconds": terms.budget_seconds,
            "budget_memory": terms.budget_memory,
            "rates": self._rates and self._rates.to_json(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the rates of a state."""
        self._rates = MeasuredRates.from_json(state["rates"]) if state.get("rates") else None
