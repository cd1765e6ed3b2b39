"""Adaptive backpropagation in a training loop: measure importance, select, train that; again every epoch."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction, list_parameters, unwrap, without_replicas
from gtcompile.costs.batch_shapes import batch_shapes
from gtcompile.costs.budgets import WHOLE, BudgetOf, resolved_budget
from gtcompile.costs.full_finetuning import refuse_quantized
from gtcompile.costs.prices import StepPrices
from gtcompile.errors import GTCompileError
from gtcompile.graph.joint_graph import names_of
from gtcompile.importance.estimators import check_batches
from gtcompile.prefix.prefix_cache import PrefixCache
from gtcompile.prefix.prefix_costs import Outlook, PrefixCosts, prefix_cache_of
from gtcompile.prices.budget_prices import BudgetPrices
from gtcompile.prices.step_prices import refuse_sharded
from gtcompile.selection.cached_prefix import CachedPrefix
from gtcompile.selection.limits import Limits, Terms, apply_terms, check_patterns, make_terms
from gtcompile.selection.policies import Best, Choose, Policy, check_holds, find_policy, for_training
from gtcompile.selection.schedule import Plan, Schedule, seeded
from gtcompile.selection.schedule_state import schedule_from, schedule_state
from gtcompile.selection.selection import Selection, describe
from gtcompile.selection.user_policy import Propose, proposer
from gtcompile.state.ever_trained import ever_trained, mark_names_trained
from gtcompile.state.optimizer_state import FrozenState, Setting
from gtcompile.state.restore import restored
from gtcompile.state.same_model import check_same_model
from gtcompile.state.trained_set import enter_shards, set_trained, trained_parameters
from gtcompile.training.cuda_graphs import CudaGraphs, check_recordable
from gtcompile.training.ddp import ranks_of
from gtcompile.training.decision import Decision, reason, trains_nothing
from gtcompile.training.graphed_step import GraphedStep
from gtcompile.training.measured_batches import first_batches
from gtcompile.training.pass_costs import PassCosts, PassTotals
from gtcompile.training.step_costs import CostsByShape, StepCosts

logger = logging.getLogger(__name__)

MOST_BATCHES = 16
"""How many batches `reselect` takes unless it is told otherwise: a loader may have thousands."""
_OPTIONAL = {"prefix", "counted", "budget_seconds", "budget_memory", "rates", "epochs"}
"""Parts of a state that only some trainings have, or that states of earlier versions lack."""


class AdaptiveBackprop:
    """Trains the parameters that most reduce the loss, within a budget of FLOPs, seconds or bytes.

    Call `reselect` with a few batches before the first epoch and then every epoch or so. In between train as
    always, and call `step` after every step of the optimizer: some policies change the trained set at every
    step, and then the budget is a mean that holds after each of them, from one `reselect` to the next. Where
    the policy trains one set, `step` changes nothing.

    The model may be plain, compiled with `torch.compile(model, backend="gtcompile")`, or have compiled
    blocks; a new set compiles nothing. Inside `DistributedDataParallel(model, find_unused_parameters=True)`
    every rank calls `reselect` with its own batches: importance is averaged over the ranks, rank 0 decides
    for all, and only trained gradients are sent. An error on one rank is raised on all. A model sharded
    with `fully_shard` behaves alike; its importance is that of all ranks' batches together.

    Args:
        model: returns its scalar loss or an output with `.loss`, unless `loss_fn` computes the loss.
        optimizer: the one that trains it.
        budget_fraction: share of FLOPs, forward and backward, that a step may take, in (0, 1]. Where batches
            differ in shape it is that of the mean step. None is 0.5, or no limit if there is another budget.
        budget_seconds: seconds that a step may take: forward, backward and optimizer. The first `reselect`
            times a few steps, see `step_prices`. With the policy "best" and in one process only.
        budget_memory: bytes that training may take beside the weights: saved for backward, gradients,
            optimizer state, and a prefix cache in the model's memory. With the policy "best" only.
        budget_of: what the budget is a share of. "step": a full step of the model as it is. With adapters,
            which alone are trained, that is a step that trains all adapters. "full_finetuning": a step that
            trains every floating-point parameter of the model, frozen or not, with PEFT's adapters switched
            off: what training the base model takes. Both are computed at the shapes of the batches given to
            `reselect`.
        policy: decides what to train within the budget: a name or a description from `gtcompile.policies`, or
            your own function, `(costs, importance, budget_fraction, generator) -> FQNs`, which is called
            for every step.
        loss_fn: takes the model and a batch of any structure and returns the scalar loss.
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance as the paper does, not across batches.
        frozen_state: where the optimizer's state of a frozen parameter goes: "keep" it, move it to host
            memory ("cpu"), or "drop" it and start anew.
        seed: of the policies that draw at random; the same on all ranks.
        prefix_cache: True to compute the frozen blocks near the input once per example instead of once per
            epoch, as `PrefixCache` does; a folder to keep their outputs on disk as well; or a `PrefixCache`
            of this model. Without `epochs` the budget is that of steps which compute everything, so a cached
            step is cheaper: see `cached_step_flops` and `computed_fraction`.
        epochs: how many epochs the training has, with one `reselect` before each. Selections then spend what
            the prefix cache saves: they weigh keeping blocks unchanged, so that an epoch's mean step has more
            FLOPs left, against training deeper, which fills the cache anew. Call `step` after each step of
            the optimizer. With the policy "best" and in one process only. None spends nothing of it.
        cuda_graphs: record whole training steps as CUDA graphs, one per trained set, so that the host
            queues one graph instead of a thousand kernels. Train with `train_step` then.

    Raises:
        ValueError: a budget out of range, a policy that does not exist or cannot hold the budgets, a pattern
            that matches nothing, or a `DistributedDataParallel` or `FullyShardedDataParallel` that would
            train or send something else; a `prefix_cache` of another model; `budget_seconds` in several
            processes, or a budget of seconds or bytes for a sharded model; `cuda_graphs` where steps cannot
            be recorded; `epochs` without a prefix cache, with another policy or in several processes.
        GTCompileError: a `prefix_cache` for a model without repeated blocks, or compiled as a whole.
        TypeError: a single string where patterns are expected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        budget_fraction: float | None = None,
        *,
        budget_seconds: float | None = None,
        budget_memory: int | None = None,
        budget_of: BudgetOf = "step",
        policy: str | Policy | Choose = "best",
        loss_fn: LossFunction | None = None,
        always: Iterable[str] = (),
        never: Iterable[str] = (),
        two_pass: bool = False,
        frozen_state: Setting = "keep",
        seed: int = 0,
        prefix_cache: PrefixCache | bool | str | Path = False,
        epochs: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self._ranks, model = ranks_of(model), without_replicas(model)
        enter_shards(model)
        self._model, self._optimizer, self._loss_fn, self._seed = model, optimizer, loss_fn, seed
        self._policy = for_training(find_policy(policy), None)
        self._two_pass = two_pass or self._policy.two_pass
        self._frozen_state = FrozenState(optimizer, frozen_state)
        self._terms = self._checked_terms(
            resolved_budget(budget_fraction, budget_seconds, budget_memory, default=0.5),
            always,
            never,
            budget_of,
            budget_seconds=budget_seconds,
            budget_memory=budget_memory,
        )
        if budget_of == "full_finetuning":
            refuse_quantized(unwrap(model))
        self._epochs = epochs
        self._check_epochs(cached=prefix_cache is not False)
        self._graphed = self._graphed_step(prefix_cache) if cuda_graphs else None
        self._history: tuple[Selection, ...] = ()
        self._importance: dict[str, float] = {}
        cache = prefix_cache_of(model, prefix_cache)
        self._prefix = None if cache is None else PrefixCosts(cache)
        self._prices = BudgetPrices(model, optimizer, loss_fn, frozen_state)
        self._costs = self._new_costs()
        self._passes = PassTotals(self._costs, self._prefix)
        self._schedule: Schedule | None = None
        self._trained: frozenset[str] = frozenset()

    @property
    def budget_fraction(self) -> float:
        """Share of the FLOPs that `budget_of` names that a step may take, in (0, 1]."""
        return self._terms.budget_fraction

    @property
    def budget_seconds(self) -> float | None:
        """Seconds that a step may take; None without such a budget."""
        return self._terms.budget_seconds

    @property
    def budget_memory(self) -> int | None:
        """Bytes that training may take beside the weights; None without such a budget."""
        return self._terms.budget_memory

    @property
    def budget_of(self) -> BudgetOf:
        """What the budget is a share of, and with it `step_fraction` and `spent_fraction`."""
        return self._terms.budget_of

    @property
    def policy(self) -> Policy:
        """The policy that decides which parameters to train within the budget."""
        return self._policy

    @property
    def selection(self) -> Selection | None:
        """The latest selection; None before the first."""
        return self._history[-1] if self._history else None

    @property
    def history(self) -> tuple[Selection, ...]:
        """The selections so far, one per `reselect`, each as it was for the first step after it."""
        return self._history

    @property
    def importance(self) -> Mapping[str, float]:
        """Importance by FQN as the latest `reselect` measured it, of the parameters that its policy needs."""
        return self._importance

    @property
    def spent_fraction(self) -> float:
        """Mean cost of the steps since `reselect` as a share of the FLOPs that `budget_of` names.

        The coming step, with the present set, is included. 0.0 before the first `reselect`.
        """
        return self._schedule.spent_fraction if self._schedule else 0.0

    @property
    def step_fraction(self) -> float:
        """Cost of a step with the present set as such a share; 0.0 before `reselect`.

        With `epochs` it is that of the mean step of the epoch, less what the prefix cache saves.
        """
        return self._schedule.fraction_of(self._trained) if self._schedule else 0.0

    @property
    def step_flops(self) -> int:
        """FLOPs of a mean step with the present set, at the shapes given to `reselect`; 0 before that."""
        return self._schedule.costs.step_flops(self._trained) if self._schedule else 0

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The cache of the frozen prefix; None without one."""
        return self._prefix.cache if self._prefix else None

    @property
    def cached_step_flops(self) -> int:
        """FLOPs of a step with the present set that starts from the prefix cache; else `step_flops`.

        They are less only where blocks near the input are frozen.
        """
        return self._prefix.cached_step_flops(self.step_flops) if self._prefix else self.step_flops

    @property
    def computed_fraction(self) -> float | None:
        """Mean share of FLOPs that the training steps so far really took; None without a prefix cache.

        It counts each forward with its backward, at the mean of the shapes given to `reselect`, or at its own
        shapes if `count` is called. It never exceeds the share without the cache.
        """
        if self._prefix is None:
            return None
        self._count_forwards()
        return self._prefix.mean_fraction

    @property
    def counted_fraction(self) -> float | None:
        """Share of FLOPs of all passes that `count` was told of, at their own shapes; None before the first.

        It is the sum of what they cost over the sum of the FLOPs that `budget_of` names, at the same shapes,
        if nothing comes from a prefix cache.
        """
        return self._passes.fraction

    def __repr__(self) -> str:
        whole = WHOLE[self.budget_of]
        set_now = "nothing selected yet" if self.selection is None else f"selected: {self.selection}"
        budget = f"budget {self.budget_fraction!r} of {whole}"
        if self.budget_seconds is not None:
            budget += f", {self.budget_seconds!r} seconds"
        if self.budget_memory is not None:
            budget += f", {self.budget_memory!r} bytes"
        return f"<AdaptiveBackprop: {budget}, policy {self._policy!r}, {set_now}>"

    def reselect(
        self,
        batches: Iterable[Any],
        *,
        max_batches: int | None = MOST_BATCHES,
        like: Iterable[Any] | None = None,
    ) -> Selection:
        """Select anew from these batches and train that from now on.

        Costs are the mean of those at the shapes of these batches; if the model branches on data, with the
        branches of the first batch of each shape. So the budget is one of the mean step, not of each.
        Importance is averaged over all batches, if the policy needs it.
        When nothing affordable is predicted to reduce the loss, the former selection stays, with a log
        message; if there is none yet, importance is measured within each batch as with `two_pass`. Nothing
        changes until the new trained set is applied, so a call that fails leaves everything as it was.

        Args:
            batches: keyword dictionaries with labels, or with `loss_fn` anything, on any device; at least
                two, or one with `two_pass`. A whole loader will do.
            max_batches: take only so many, with a log message; None takes all.
            like: batches whose shapes are those of the training, if those in `batches` are not. They are read
                only if `batches` have several shapes.

        Returns:
            The selection for the next step, which prints as one line. If the policy changes the set at every
            step, later steps may cost more than the budget, but never so much that the mean does. With
            `Progressive` the first steps do, and the mean is within the budget in the end.

        Raises:
            BudgetError: the budget trains nothing on this model, or not even `always`; names the smallest
                that works.
            CaptureError: the model could not be captured or there is no loss.
            GTCompileError: too few batches are finite, or nothing is predicted to reduce the loss and there
                is no former selection.
            ValueError, TypeError: batches, patterns or optimizer do not fit the model, or differ by rank.
        """
        ranks = self._ranks
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"expected max_batches of at least 1, or None for all, got {max_batches!r}")
        enter_shards(self._model)
        if self._graphed:
            self._graphed.forget()  # measuring needs memory
        ranks.agree(self._common_ground())
        outlook = self._outlook()
        with self._not_counted(), restored(unwrap(self._model)):
            chosen = first_batches(batches, max_batches)
            checked, known = ranks.together(lambda: self._prepare(chosen, like))
            prices = ranks.together(lambda: self._step_prices(checked[0], known))
            limits = ranks.from_first(
                lambda: apply_terms(known.costs, self._terms, known.whole_flops, prices)
            )
            if outlook is not None:
                limits = replace(limits, prefix=self._cached_prefix(outlook, known))
            importance, plan = self._plan(limits, checked, two_pass=self._two_pass)
            if trains_nothing(plan) and self.selection is None and not self._two_pass:
                logger.warning("%s: measured within each batch instead", reason(limits))
                importance, plan = self._plan(limits, checked, two_pass=True)
        schedule, selection = self._begin(plan, limits, importance)
        self._train(selection.trained)
        ranks.agree({"the trained set": sorted(trained_parameters(self._model))})
        self._importance, self._schedule = importance, schedule
        if self._prefix:
            kept, promised = schedule.plan.kept_blocks, schedule.plan.saved_flops > 0
            self._prefix.begin(known.block_flops, kept, promised=promised)
        self._history += (selection,)
        return selection

    def step(self) -> frozenset[str]:
        """Train the policy's set for the next step; to be called once after every step of the optimizer.

        With gradient accumulation that is once per `optimizer.step()`, not once per batch. Nothing is
        compiled or measured. All ranks make the call.

        Returns:
            The FQNs trained from now on.

        Raises:
            GTCompileError: nothing was selected yet.
            ValueError, TypeError: your own policy returned no parameters of the model.
        """
        schedule = self._selected("there is no selection to go on from; call reselect(batches) before step()")
        if self._prefix and self._epochs is not None:
            self._count_forwards()
            schedule.charge(self._prefix.unforeseen_flops())
        trained = schedule.next_set()
        if trained != self._trained:
            self._train(trained)
        return trained

    def costs_of(self, batch: Any) -> PassCosts:
        """Return what a forward and backward with the present set cost at this batch's shapes.

        Only the first few shapes are captured; the costs at others follow from those.

        Raises:
            GTCompileError: nothing was selected yet.
            CaptureError: the model cannot be captured with this batch.
        """
        schedule = self._selected("costs are those of a trained set; call reselect(batches) first")
        return self._passes.costs_of(batch, schedule, self._trained, self.budget_of)

    def count(self, batch: Any) -> PassCosts:
        """Count a forward and backward with the present set, at this batch's shapes.

        To be called once after each backward where batches differ in shape: `counted_fraction` is then exact.
        A shape whose costs cannot be captured counts as a mean step, with a log message.

        Returns:
            What it cost.

        Raises:
            GTCompileError: nothing was selected yet.
        """
        schedule = self._selected("costs are those of a trained set; call reselect(batches) first")
        return self._passes.count(batch, schedule, self._trained, self.budget_of)

    def _selected(self, otherwise: str) -> Schedule:
        """The schedule of the latest selection; `otherwise` is the error's text."""
        if self._schedule is None:
            raise GTCompileError(otherwise)
        return self._schedule

    def _not_counted(self) -> contextlib.AbstractContextManager[None]:
        """A context in which forwards are no training."""
        return self._prefix.paused() if self._prefix else contextlib.nullcontext()

    def train_step(self, batch: Any) -> torch.Tensor:
        """Run forward, backward and the optimizer for one batch, as a CUDA graph from the fourth step on.

        The first steps with a set run as usual and train as usual; then one step is recorded, and replayed
        for every batch of its shapes until the set changes. Batches of other shapes run as usual. Schedulers
        and `step` are called afterwards, as in a loop of your own. A replay calls no Python code: hooks do
        not run, and what a forward decides by itself, such as dropping a layer at random, is fixed.

        Args:
            batch: as for `reselect`, on any device.

        Returns:
            The loss, without history; nothing waits for the device until you read it.

        Raises:
            GTCompileError: this was made without `cuda_graphs=True`, there are gradients from before,
                autocast is on outside of `loss_fn`, or the step cannot be recorded.
        """
        if self._graphed is None:
            raise GTCompileError(
                "train_step replays CUDA graphs: make AdaptiveBackprop(..., cuda_graphs=True), or call "
                "backward() and optimizer.step() yourself"
            )
        return self._graphed(batch)

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, as JSON types; neither weights nor the optimizer's state."""
        shapes, schedule = _shapes(self._model), self._schedule
        return {
            "budget_fraction": self._terms.budget_fraction,
            "budget_of": self._terms.budget_of,
            "always": list(self._terms.always),
            "never": list(self._terms.never),
            "policy": repr(self._policy),
            "seed": self._seed,
            "epochs": self._epochs,
            "parameters": shapes,
            "trained": sorted(trained_parameters(self._model)),
            "ever_trained": sorted(ever_trained(self._model)),
            "importance": dict(self._importance),
            "history": [{**asdict(past), "trained": sorted(past.trained)} for past in self._history],
            "schedule": schedule_state(schedule, sorted(shapes)) if schedule else None,
            "counted": [self._passes.flops, self._passes.whole],
            **self._prefix_state(),
            **self._prices.state(self._terms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned, in the middle of an epoch or not.

        Budget, patterns, seed and history become those of the state, and its trained set is trained from now
        on. The next calls of `step` return the sets that would have come next, with one exception. Values in
        a prefix cache are not part of a state: without a folder, the next steps compute them again. With
        `epochs`, where the budget counted on these values, cheaper sets then pay for that, and the next
        selection may count on none. Such a training does not equal one that never stopped.

        Raises:
            ValueError: this is no such state, or that of another model (names the differences), policy or
                number of `epochs`; nothing has changed then.
        """
        self.check_state(state)
        history = tuple(
            Selection(**{**past, "trained": frozenset(past["trained"])}) for past in state["history"]
        )
        terms = self._terms_in(state)
        importance, schedule = dict(state["importance"]), None
        if state["schedule"] is not None:
            parameters = list_parameters(unwrap(self._model))
            propose = self._proposer(terms, importance, state["schedule"]["whole_flops"])
            schedule = schedule_from(state["schedule"], parameters, propose)
        self._train(frozenset(state["trained"]))
        mark_names_trained(self._model, state["ever_trained"])
        self._terms, self._history, self._seed = terms, history, state["seed"]
        self._importance, self._schedule = importance, schedule
        self._prices.restore(state)
        self._costs = self._new_costs()
        self._passes = PassTotals(self._costs, self._prefix, *state.get("counted", ()))
        if self._prefix:
            kept, saved = (schedule.plan.kept_blocks, schedule.plan.saved_flops) if schedule else (None, 0)
            self._prefix.resume(state.get("prefix", {}), kept, promised=saved > 0)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that `load_state_dict` would refuse; nothing changes.

        Raises:
            ValueError: this is no such state, or that of another model (names the differences), policy or
                number of `epochs`.
        """
        if missing := sorted(self.state_dict().keys() - _OPTIONAL - state.keys()):
            raise ValueError(f"expected the state of an AdaptiveBackprop; it lacks {', '.join(missing)}")
        check_same_model(state["parameters"], _shapes(self._model), "this is the state")
        if state["policy"] != repr(self._policy):
            raise ValueError(
                f"this is the state of the policy {state['policy']}, and here the policy is "
                f"{self._policy!r}; give the same one"
            )
        self._check_same_epochs(state)
        self._terms_in(state)

    def _check_same_epochs(self, state: Mapping[str, Any]) -> None:
        saved, weighed = state.get("epochs"), (state["schedule"] or {}).get("kept_blocks") is not None
        if self._epochs is None and (weighed or saved is not None):
            same = "the same epochs" if saved is None else f"epochs={saved}"
            raise ValueError(
                "this is the state of a training that spends what its prefix cache saves; give prefix_cache "
                f"and {same} here"
            )
        if "epochs" in state and saved != self._epochs:
            raise ValueError(
                f"this is the state of a training with epochs={saved}, and here are epochs={self._epochs}; "
                f"give the same"
            )

    def _terms_in(self, state: Mapping[str, Any]) -> Terms:
        return self._checked_terms(
            state["budget_fraction"],
            state["always"],
            state["never"],
            state["budget_of"],
            budget_seconds=state.get("budget_seconds"),
            budget_memory=state.get("budget_memory"),
        )

    def _new_costs(self) -> CostsByShape:
        """Costs that are not captured yet; with saved bytes if there is a budget of them."""
        blocks = self._prefix.cache.blocks if self._prefix else ()
        memory = self._terms.budget_memory is not None
        return CostsByShape(self._model, self._loss_fn, blocks, memory=memory)

    def _step_prices(self, batch: Any, known: StepCosts) -> StepPrices:
        """What steps take in seconds and bytes, as far as there is a budget of them."""
        nanoseconds = memory = None
        if self._terms.budget_seconds is not None:
            timed = self._costs.of(batch, self.budget_of)
            nanoseconds = self._prices.seconds(batch, timed.costs, known.costs)
        if self._terms.budget_memory is not None:
            memory = self._prices.bytes(known.saved, self._cache_bytes())
        return StepPrices(nanoseconds=nanoseconds, memory=memory)

    def _check_epochs(self, *, cached: bool) -> None:
        """Check the argument `epochs`.

        Raises:
            ValueError: it is out of range, or nothing here can be weighed.
        """
        epochs = self._epochs
        if epochs is None:
            return
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"expected epochs as a number of at least 1, got {epochs!r}")
        if not cached:
            raise ValueError(
                "epochs let selections spend what a prefix cache saves: give prefix_cache=True as well, or "
                "leave them out"
            )
        if not isinstance(self._policy, Best):
            raise ValueError(
                f'epochs work with policy="best" alone, got the policy {self._policy!r}; leave them out, or '
                f"use that policy"
            )
        if self._ranks.count > 1:
            raise ValueError(
                "epochs work in one process, since each process caches its own examples; leave them out"
            )

    def _outlook(self) -> Outlook | None:
        """What can be expected of the prefix cache; None if selections do not weigh it."""
        if self._prefix is None or self._epochs is None:
            return None
        self._count_forwards()
        return self._prefix.outlook()

    def _cached_prefix(self, outlook: Outlook, known: StepCosts) -> CachedPrefix | None:
        """What selections know of the prefix cache; None if no forward could show where blocks begin."""
        cache, left = self.prefix_cache, max(1, (self._epochs or 1) - len(self._history))
        if cache is None or not cache.surveyed or cache.stats.disabled:
            return None
        depths = cache.depths()
        here = {fqn: depths.get(fqn, 0) for fqn in known.costs.fqns}
        return outlook.of(here, known.block_flops, left)

    def _cache_bytes(self) -> int:
        """Bytes that a prefix cache may take of the memory in which the model is."""
        cache = self.prefix_cache
        here = next(self._model.parameters()).device.type
        return cache.most_bytes if cache is not None and cache.device.type == here else 0

    def _prefix_state(self) -> dict[str, Any]:
        if self._prefix is None:
            return {}
        self._count_forwards()
        return {"prefix": self._prefix.state()}

    def _count_forwards(self) -> None:
        """Count what the steps with the present set computed; before the set or its costs change."""
        if self._prefix:
            self._prefix.count(self.step_flops, self._schedule.whole_flops if self._schedule else 0)

    def _graphed_step(self, prefix_cache: object) -> GraphedStep:
        if prefix_cache is not False:
            raise ValueError("prefix_cache looks every batch up on the host, which no CUDA graph does")
        check_recordable(self._model, self._optimizer, self._ranks.count)
        recorder = CudaGraphs(next(self._model.parameters()).device)
        return GraphedStep(self._model, self._optimizer, self._loss_fn, recorder)

    def _train(self, trained: frozenset[str]) -> None:
        self._count_forwards()
        if self._graphed:
            self._graphed.forget()
        self._trained = set_trained(self._model, trained)
        self._frozen_state.apply()

    def _checked_terms(
        self,
        budget_fraction: float,
        always: Iterable[str],
        never: Iterable[str],
        budget_of: BudgetOf,
        *,
        budget_seconds: float | None,
        budget_memory: int | None,
    ) -> Terms:
        terms = make_terms(
            budget_fraction,
            always,
            never,
            budget_of,
            budget_seconds=budget_seconds,
            budget_memory=budget_memory,
        )
        check_holds(self._policy, terms)
        if terms.needs_prices:
            refuse_sharded(self._model)
        if terms.budget_seconds is not None and self._ranks.count > 1:
            raise ValueError(
                "budget_seconds is measured in one process, without the time that gradients travel; with "
                "several processes use budget_fraction or budget_memory"
            )
        check_patterns(terms, names_of(list_parameters(unwrap(self._model))))
        return terms

    def _common_ground(self) -> dict[str, Any]:
        """Values that must be equal on all ranks, by their name in messages."""
        return {
            "the budget": self._terms.budget_fraction,
            "the budget of bytes": self._terms.budget_memory,
            "what the budget is a share of": self._terms.budget_of,
            "the patterns in always": self._terms.always,
            "the patterns in never": self._terms.never,
            "the policy": repr(self._policy),
            "the seed": self._seed,
            "the model": _shapes(self._model),
            "the version of torch": torch.__version__,
            "the number of selections so far": len(self._history),
            "the number of steps since the selection": self._schedule.progress.steps if self._schedule else 0,
        }

    def _prepare(
        self, batches: Iterable[Any], like: Iterable[Any] | None
    ) -> tuple[tuple[Any, ...], StepCosts]:
        """Check the batches; return them with the mean costs at their shapes, or at those of `like`."""
        one_is_enough = self._two_pass or self._policy.measured == "nothing"
        checked = check_batches(
            self._model, batches, minimum=1 if one_is_enough else 2, loss_fn=self._loss_fn
        )
        if self._prefix:
            self._prefix.survey(lambda: self._costs.run(checked[0]))
        self._costs.forget_values()
        several = len(set(map(batch_shapes, checked))) > 1
        shaped = list(like) if several and like is not None else []
        return checked, self._costs.mean(shaped or checked, self.budget_of)

    def _plan(
        self, limits: Limits, batches: Sequence[Any], *, two_pass: bool
    ) -> tuple[dict[str, float], Plan]:
        decision = Decision(
            model=self._model,
            optimizer=self._optimizer,
            loss_fn=self._loss_fn,
            policy=self._policy,
            ranks=self._ranks,
        )
        generator = seeded(self._seed, len(self._history), "plan")
        return decision.plan(limits, batches, generator, two_pass=two_pass)

    def _begin(
        self, plan: Plan, limits: Limits, importance: Mapping[str, float]
    ) -> tuple[Schedule, Selection]:
        """Start the schedule of a plan; return it with its first set as a selection.

        If the plan trains nothing, the former plan goes on.
        """
        former, costs, whole = self._schedule, limits.costs, limits.whole_flops
        if stays := trains_nothing(plan):
            if former is None:
                raise GTCompileError(f"{reason(limits)}; measure on more batches, or lower the learning rate")
            logger.warning("%s: the former selection stays", reason(limits))
            plan, costs, whole = former.plan, former.costs, former.whole_flops
        schedule = Schedule(
            plan,
            costs,
            limits.budget_fraction,
            seed=self._seed,
            number=len(self._history),
            propose=self._proposer(self._terms, importance, whole),
            progress=former.finished(whole or costs.full_flops) if former and plan.lasts else None,
            whole_flops=whole,
        )
        trained = schedule.next_set()
        if self.selection and stays:
            return schedule, self.selection
        return schedule, plan.selection or describe(limits, importance, trained, None)

    def _proposer(self, terms: Terms, importance: Mapping[str, float], whole_flops: int) -> Propose | None:
        return proposer(self._policy, terms, importance, whole_flops, self._ranks)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {p.fqn: list(p.shape) for p in list_parameters(unwrap(model))}
