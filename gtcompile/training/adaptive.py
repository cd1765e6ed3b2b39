"""Adaptive backpropagation in a training loop: measure, select, train that; again every epoch."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import list_parameters, loss_of, unwrap, without_replicas
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.costs.budgets import check_budget
from gtcompile.errors import CaptureError, GTCompileError
from gtcompile.graph.joint_graph import names_of
from gtcompile.graph.names import match_patterns
from gtcompile.importance.estimators import check_batches, measure_importance
from gtcompile.importance.gradient_stream import on_device
from gtcompile.selection.selection import Selection, parameters_to_measure, select_parameters
from gtcompile.state.optimizer_state import FrozenState, Setting
from gtcompile.state.restore import restored
from gtcompile.state.same_model import check_same_model
from gtcompile.state.trained_set import enter_shards, train_only, trained_parameters
from gtcompile.training.ddp import ranks_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What the user asked of every selection."""

    budget_fraction: float
    always: tuple[str, ...]
    never: tuple[str, ...]


class AdaptiveBackprop:
    """Keeps a model training the parameters most worth it within a FLOPs budget.

    Call `reselect` with a few batches before the first epoch and then every epoch or so; in between, train as
    always. The model may be plain, compiled with `torch.compile(model, backend="gtcompile")`, or have
    compiled blocks. Inside `DistributedDataParallel(model, find_unused_parameters=True)` every rank calls
    `reselect` with batches of its own: importance is averaged over the ranks, rank 0 decides for all, and
    only trained gradients are sent. What fails on one rank is raised on all. So it is with a model sharded
    with `fully_shard`, whose importance is that of all ranks' batches together.

    Args:
        model: returns its scalar loss or an output with `.loss`.
        optimizer: the one that trains it.
        budget_fraction: share of a full step's FLOPs, forward and backward, that a step may take, in (0, 1].
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance as the paper does, not across batches.
        frozen_state: what becomes of the optimizer's state of a parameter while it is frozen: "keep" it, move
            it to host memory ("cpu"), or "drop" it and start anew.
        loss_module: computes the loss that training really uses, with the model's parameters under the
            model's names. Importance is measured through it; costs are those of the model's own loss, which
            batches must contain the labels for.

    Raises:
        ValueError: a budget outside (0, 1], a pattern that matches nothing, or a `DistributedDataParallel`
            or `FullyShardedDataParallel` that would train or send something else.
        TypeError: a single string where patterns are expected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        budget_fraction: float = 0.5,
        *,
        always: Iterable[str] = (),
        never: Iterable[str] = (),
        two_pass: bool = False,
        frozen_state: Setting = "keep",
        loss_module: nn.Module | None = None,
    ) -> None:
        self._ranks, model = ranks_of(model), without_replicas(model)
        enter_shards(model)
        self._model, self._optimizer, self._two_pass = model, optimizer, two_pass
        self._loss_module = model if loss_module is None else loss_module
        self._frozen_state = FrozenState(optimizer, frozen_state)
        self._terms = _check_terms(model, budget_fraction, always, never)
        self._history: tuple[Selection, ...] = ()
        self._importance: dict[str, float] = {}
        self._known_costs: dict[object, BackwardCosts] = {}

    @property
    def budget_fraction(self) -> float:
        """Share of a full step's FLOPs that a step may take, in (0, 1]."""
        return self._terms.budget_fraction

    @property
    def selection(self) -> Selection | None:
        """The latest selection; None before the first."""
        return self._history[-1] if self._history else None

    @property
    def history(self) -> tuple[Selection, ...]:
        """The selections so far, one per `reselect`."""
        return self._history

    @property
    def importance(self) -> Mapping[str, float]:
        """Importance by FQN as the latest `reselect` measured it, of the parameters it had to decide on."""
        return self._importance

    def reselect(self, batches: Iterable[Mapping[str, Any]]) -> Selection:
        """Select anew from these batches and train that from now on.

        Costs are those of a batch with the shapes of the first, or of the way that the first takes where the
        model branches on data; importance is averaged over all. When nothing
        affordable is predicted to reduce the loss, the former selection stays, with a log message; where
        there is none yet, batches that contradict each other are measured as with `two_pass`. Until the new
        trained set is applied nothing changes, so a call that fails leaves everything as it was.

        Args:
            batches: keyword dictionaries with labels; at least two, or one with `two_pass`.

        Returns:
            The selection, which prints as one line.

        Raises:
            BudgetError: the budget trains nothing on this model, or not even `always`; names the smallest
                that works.
            CaptureError: the model could not be captured or returns no loss.
            GTCompileError: too few batches are finite, or nothing is predicted to reduce the loss and there
                is no former selection.
            ValueError, TypeError: batches, patterns or optimizer do not fit the model, or differ by rank.
        """
        ranks = self._ranks
        enter_shards(self._model)
        ranks.agree(self._common_ground())
        with restored(unwrap(self._model)):
            checked, costs = ranks.together(lambda: self._prepare(batches))
            asked = ranks.from_first(lambda: self._asked(costs))
            importance, selection = self._decide(asked, checked, costs, two_pass=self._two_pass)
            if not selection.trained and self.selection is None and not self._two_pass:
                logger.warning("%s: measured within each batch instead", _reason(selection))
                importance, selection = self._decide(asked, checked, costs, two_pass=True)
        selection = selection if selection.trained else self._former_selection(selection)
        train_only(self._model, selection.trained)
        ranks.agree({"the trained set": sorted(trained_parameters(self._model))})
        self._frozen_state.apply()
        self._importance = importance
        self._history += (selection,)
        return selection

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, as JSON types; neither weights nor the optimizer's state."""
        return {
            "budget_fraction": self._terms.budget_fraction,
            "always": list(self._terms.always),
            "never": list(self._terms.never),
            "parameters": _shapes(self._model),
            "trained": sorted(trained_parameters(self._model)),
            "importance": dict(self._importance),
            "history": [{**asdict(past), "trained": sorted(past.trained)} for past in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: budget, patterns, history and, from now on, its trained set.

        Raises:
            ValueError: for something else than such a state, or the state of another model (names the
                differences); nothing has changed then.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"expected the state of an AdaptiveBackprop; it lacks {', '.join(missing)}")
        check_same_model(state["parameters"], _shapes(self._model), "this is the state")
        history = tuple(
            Selection(**{**past, "trained": frozenset(past["trained"])}) for past in state["history"]
        )
        terms = _check_terms(self._model, state["budget_fraction"], state["always"], state["never"])
        train_only(self._model, state["trained"])
        self._frozen_state.apply()
        self._terms, self._history, self._importance = terms, history, dict(state["importance"])

    def _costs(self, batch: Mapping[str, Any]) -> BackwardCosts:
        """The costs at this batch's shapes, captured anew when they differ from the last or values matter."""
        key = _shapes_in(batch)
        known = self._known_costs.get(key)
        if known is None or known.follows_values:
            try:
                self._known_costs = {key: backward_costs(self._model, batch)}
            except CaptureError:
                self._check_loss(batch)
                raise
        return self._known_costs[key]

    @torch.no_grad()
    def _check_loss(self, batch: Mapping[str, Any]) -> None:
        """Let the model say what is wrong with the batch, where something is."""
        device = next(self._model.parameters()).device
        loss_of(self._model(**on_device(batch, device)))

    def _common_ground(self) -> dict[str, Any]:
        """What all ranks must have the same of."""
        return {
            "the budget": self._terms.budget_fraction,
            "the patterns in always": self._terms.always,
            "the patterns in never": self._terms.never,
            "the model": _shapes(self._model),
            "the version of torch": torch.__version__,
            "the number of selections so far": len(self._history),
        }

    def _prepare(
        self, batches: Iterable[Mapping[str, Any]]
    ) -> tuple[tuple[Mapping[str, Any], ...], BackwardCosts]:
        checked = check_batches(self._loss_module, batches, minimum=1 if self._two_pass else 2)
        return checked, self._costs(checked[0])

    def _asked(self, costs: BackwardCosts) -> list[str]:
        """FQNs of what is not settled before importance is known."""
        terms = self._terms
        return sorted(
            parameters_to_measure(costs, terms.budget_fraction, always=terms.always, never=terms.never)
        )

    def _decide(
        self, asked: list[str], batches: Sequence[Mapping[str, Any]], costs: BackwardCosts, *, two_pass: bool
    ) -> tuple[dict[str, float], Selection]:
        """Importance over all ranks, and rank 0's selection by it, which may be empty."""
        ranks, terms = self._ranks, self._terms
        importance = ranks.mean(ranks.together(lambda: self._measure(asked, batches, two_pass=two_pass)))
        selection = ranks.from_first(
            lambda: select_parameters(
                costs, importance, terms.budget_fraction, always=terms.always, never=terms.never
            )
        )
        return importance, selection

    def _measure(
        self, asked: list[str], batches: Sequence[Mapping[str, Any]], *, two_pass: bool
    ) -> dict[str, float]:
        """Importance of what is asked for; 0 for parameters these batches did not use."""
        if not asked:
            return {}
        measured = measure_importance(
            self._loss_module, self._optimizer, batches, only=asked, two_pass=two_pass
        )
        return {fqn: measured.get(fqn, 0.0) for fqn in asked}

    def _former_selection(self, empty: Selection) -> Selection:
        if self.selection is None:
            raise GTCompileError(f"{_reason(empty)}; measure on more batches, or lower the learning rate")
        logger.warning("%s: the former selection stays", _reason(empty))
        return self.selection


def _reason(empty: Selection) -> str:
    return f"training any of the {empty.selectable} parameters is predicted to raise the loss"


def _check_terms(
    model: nn.Module, budget_fraction: float, always: Iterable[str], never: Iterable[str]
) -> _Terms:
    check_budget(budget_fraction)
    names = names_of(list_parameters(unwrap(model)))
    return _Terms(
        budget_fraction=budget_fraction,
        always=_check_patterns(names, always),
        never=_check_patterns(names, never),
    )


def _check_patterns(names: dict[str, str], patterns: Iterable[str]) -> tuple[str, ...]:
    given = patterns if isinstance(patterns, str) else tuple(patterns)
    match_patterns(names, given)  # also refuses a single string
    return tuple(given)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {p.fqn: list(p.shape) for p in list_parameters(unwrap(model))}


def _shapes_in(value: Any) -> object:
    """What of a batch its costs depend on: shapes and types of tensors, and every other value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _shapes_in(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shapes_in(item) for item in value)
    return repr(value)
