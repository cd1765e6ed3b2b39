"""Adaptive backpropagation in Hugging Face's trainers, as a callback."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from gtcompile.compiler.blocks import compile_blocks, find_blocks, uncompile_blocks
from gtcompile.errors import CaptureError, GTCompileError
from gtcompile.huggingface.batches import batches_of_an_epoch, draw_batches, made_of, prepared
from gtcompile.huggingface.compatibility import (
    check_labels_stay,
    check_trainer,
    check_uncompiled,
    input_hooks_removed,
)
from gtcompile.huggingface.trainer_loss import (
    TrainerLoss,
    adapters_switched_safely,
    batches_noted,
    labelled_logits_only_in,
)
from gtcompile.state.optimizer_state import (
    complete_when_saved,
    forget_state_of_others,
    parameters_with_state,
)
from gtcompile.state.trained_set import train_only
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.callback_options import (
    CallbackOptions,
    Progress,
    selection_numbers,
    takes,
    used_by_another_training,
    warn_of_other_torch,
)

logger = logging.getLogger(__name__)

SHAPES_SEEN = 64
"""Batches of an epoch whose shapes the costs of a selection are the mean of, where shapes differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """The training under way."""

    trainer: Trainer
    model: nn.Module
    """The model without wrappers of parallel training."""
    optimizer: Optimizer
    """The optimizer as accelerate prepared it."""
    changes: contextlib.ExitStack
    """Undoes what the callback changed on the model, the optimizer and the trainer."""


class AdaptiveBackpropCallback(TrainerCallback, ExportableState):
    """Trains, within a FLOPs budget, the parameters that most reduce the loss; for `transformers.Trainer`.

    `Trainer(..., callbacks=[AdaptiveBackpropCallback(0.5)])` is enough; TRL's trainers work too. When
    training begins, the callback compiles the model's repeated blocks, or the whole model if it has none.
    Then, and again every epoch or every so many steps, it measures importance on examples of the training
    data, through the trainer's own collator, loss and autocast, and selects a new set to train. Costs are
    those of all that the trainer's `compute_loss` does.

    The trainer's loggers receive the selection (`adaptive/...`) and its checkpoints contain it. When training
    ends, the model is as it was before: not compiled, all parameters trainable that were.

    Args:
        budget_fraction: share of FLOPs, forward and backward, that a step may take, in (0, 1]. Where batches
            differ in shape it is that of the mean step of an epoch. None is 0.5, or no limit if there is
            another budget.
        budget_seconds: seconds that a step may take, as for `AdaptiveBackprop`.
        budget_memory: bytes that training may take beside the weights, as for `AdaptiveBackprop`.
        budget_of: what the budget, and every share that is logged, is a share of: "step" for a full step of
            the model with its adapters, or "full_finetuning", as for `AdaptiveBackprop`.
        policy: how the set is selected, as for `AdaptiveBackprop`.
        every: select at each "epoch", a pass over the data, or after this many optimizer steps.
        batches: number of batches of the trainer's size that importance is measured on, at least 2 (1 with
            `two_pass`). They are drawn anew each time, and depend on the trainer's seed and the step alone; a
            data set without a length gives its first examples.
        compiled: whether to compile; without it, parameters are frozen by `requires_grad_`.
        compiler: of the blocks' graphs, "inductor" or "eager".
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance within each batch, as the paper does, instead of across batches.
        frozen_state: where a frozen parameter's optimizer state goes: "keep" it, move it to host memory
            ("cpu"), or "drop" it.
        activation_memory_budget: share of the bytes saved for backward that the blocks may keep, in [0, 1];
            the backward recomputes the rest.
        prefix_cache: True to compute the frozen blocks near the input once per example instead of once per
            epoch, in host memory, as `gtcompile.PrefixCache` does; a folder to keep their outputs on disk as
            well. The budget is that of steps that compute everything; what was computed is logged.
        labelled_logits: compute the head and the loss at labelled positions alone, as
            `gtcompile.only_labelled_logits` does. The collator and evaluations stay as they are.

    Raises:
        ValueError, TypeError: for arguments outside these ranges. `Trainer(...)` and `.train()` raise
            ValueError for settings that would undo the selection (a second such callback,
            `torch_compile=True`, a model that is compiled already, reentrant checkpointing, DeepSpeed,
            version 1 of FSDP, several devices in one process), for `labelled_logits` where the trainer takes
            the labels out of the batch, and for a checkpoint of another model or budget.
        BudgetError: from `.train()`, when the budget trains nothing on this model; names the smallest budget
            that does.
    """

    @takes(CallbackOptions)
    def __init__(self, budget_fraction: float | None = None, **options: Any) -> None:
        self._options = CallbackOptions(budget_fraction, **options)
        self._progress = Progress()
        self._trainer: weakref.ref[Trainer] | None = None
        self._training: _Training | None = None
        self._adaptive: AdaptiveBackprop | None = None
        self._passed: list[dict[str, Any]] = []
        """Batches of the step under way whose costs are not counted yet."""

    @property
    def adaptive(self) -> AdaptiveBackprop:
        """The selections and importances of the present or latest training.

        Raises:
            GTCompileError: before training.
        """
        if self._adaptive is None:
            raise GTCompileError("nothing is selected before training begins; call trainer.train() first")
        return self._adaptive

    def attach(self, trainer: Trainer) -> Self:
        """Tell the callback which trainer it belongs to, and add it to that trainer's callbacks.

        `callbacks=[...]` needs no such call. It is for a callback that joins a trainer that exists already.

        Args:
            trainer: a `transformers.Trainer` or one derived from it.

        Returns:
            The callback itself.

        Raises:
            ValueError: for settings of the trainer that would undo the selection.
        """
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        if self._trainer is None or self._trainer() is not trainer:
            self._check(trainer)
            self._trainer = weakref.ref(trainer)
            self._release_after_failures_of(trainer)
        if trainer.args.world_size > 1:  # otherwise DDP gives frozen parameters gradients of zero
            trainer.args.ddp_find_unused_parameters = True
        return self

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the trainer under construction; refuse settings before any work is done."""
        self.attach(self._calling_trainer())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compile the blocks; continue with a checkpoint's trained set if there is one.

        With `auto_find_batch_size` this event comes again, without `on_train_end` in between.
        """
        self._release()
        trainer = self._trainer_of(state)
        self._check(trainer)
        model, optimizer, options = kwargs["model"], kwargs["optimizer"], self._options
        self._progress, changes = Progress(), contextlib.ExitStack()
        self._training = _Training(trainer=trainer, model=model, optimizer=optimizer, changes=changes)
        try:
            if trainer.is_fsdp_enabled:
                changes.callback(complete_when_saved(optimizer).remove)
            changes.callback(train_only, model, None)
            changes.enter_context(input_hooks_removed(model))
            self._adaptive = self._make_adaptive(trainer, model, optimizer)
            if (cache := self._adaptive.prefix_cache) is not None:
                changes.callback(cache.remove)
            if options.compiled:
                changes.callback(uncompile_blocks, model)
                whole_model = [""]
                blocks = list(find_blocks(model)) or whole_model
                compile_blocks(model, blocks=blocks, **options.compile_options)
            changes.enter_context(adapters_switched_safely(trainer, model))
            changes.enter_context(batches_noted(trainer, self._passed.append))
            if options.labelled_logits:
                changes.enter_context(labelled_logits_only_in(trainer, model))
            self._restore(state)
        except BaseException:
            self._release()
            raise

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the first step of an epoch select a new set, except in the epoch a training resumes in."""
        starts = self._options.every == "epoch" and not self._progress.mid_epoch
        self._change(due=self._progress.due or starts, mid_epoch=False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Select a new set when one is due."""
        every = self._options.every
        due = self._progress.due or (every != "epoch" and state.global_step % every == 0)
        if due and self._progress.selected_at != state.global_step:
            try:
                self._reselect(args, state, kwargs["train_dataloader"])
            except BaseException:
                self._release()
                raise
        self._change(due=False)
        self._passed.clear()  # those of a selection or an evaluation

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what a forward and backward cost whose gradients are accumulated."""
        self._count_passes()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what the step cost; policies that change the set by the step choose the next one."""
        self._count_passes()
        self._progress = self._progress.after_step(self.adaptive.step_fraction)
        self.adaptive.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what was spent; leave the model as it was before training."""
        if self._training is not None and self._progress.steps:
            self._training.trainer.log(self._spent())
        self._release()

    def _count_passes(self) -> None:
        passed, self._passed[:] = tuple(self._passed), []
        for batch in passed:
            self.adaptive.count(batch)
        self._passed.clear()  # a capture of costs computes losses, too

    def measured_batches(self, args: TrainingArguments, state: TrainerState, loader: Any) -> Iterator[Any]:
        """Draw the examples on which a selection before the coming step measures importance.

        They depend on the trainer's seed, its rank and the step alone, so every call draws the same.

        Args:
            args: of the trainer.
            state: of the trainer.
            loader: the trainer's loader of training data.

        Yields:
            What the trainer's collator makes of them, before the trainer prepares it for its loss.
        """
        size = state.train_batch_size or args.train_batch_size
        seed = f"{args.seed} {state.global_step}" + (f" {args.process_index}" if args.world_size > 1 else "")
        return draw_batches(loader, self._options.batches, size, seed)

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as JSON types."""
        selected = self._adaptive is not None and self._progress.selected_at >= 0
        progress = {
            "torch": torch.__version__,
            "selected_at": self._progress.selected_at,
            "steps": self._progress.steps,
            "adaptive": self.adaptive.state_dict() if selected else None,
            "with_state": self._parameters_with_state(),
        }
        return {"args": self._options.to_json(), "attributes": {"progress": progress}}

    def _parameters_with_state(self) -> list[str] | None:
        """FQNs of the parameters with optimizer state; None if checkpoints hold it as it is.

        For a sharded model, missing optimizer state is filled in when it is saved, so a checkpoint must name
        the parameters that had state before.
        """
        if self._training is None or not self._training.trainer.is_fsdp_enabled:
            return None
        return parameters_with_state(self._training.model, self._training.optimizer)

    def _make_adaptive(self, trainer: Trainer, model: nn.Module, optimizer: Optimizer) -> AdaptiveBackprop:
        wrapped: Any = trainer.model_wrapped
        return self._options.make_adaptive(
            wrapped if isinstance(wrapped, DistributedDataParallel) else model,
            optimizer,
            steps=trainer.state.max_steps,
            seed=trainer.args.seed,
            loss_fn=TrainerLoss(trainer),
        )

    def _reselect(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        if self._training is None:
            raise used_by_another_training(self)
        trainer = self._training.trainer
        self._training.model.train()  # like the step that follows; an evaluation may have come before it
        batches = self.measured_batches(args, state, loader)
        try:
            measured = prepared(trainer, batches, self._options.batches)
            epoch = batches_of_an_epoch(loader, SHAPES_SEEN, f"{args.seed} {state.global_step}")
            like = made_of(trainer, epoch)
            selection = self.adaptive.reselect(measured, max_batches=None, like=like)
        except CaptureError as error:
            raise CaptureError(
                f"costs are those of {type(trainer).__name__}.compute_loss: {error}"
            ) from error
        self._change(selected_at=state.global_step)
        logger.info("step %d: %s", state.global_step, selection)
        trainer.log(selection_numbers(selection) | self._spent())

    def _spent(self) -> dict[str, float]:
        """Shares of FLOPs of all steps so far; with a prefix cache, also of what they computed."""
        if (spent := self.adaptive.counted_fraction) is None:
            return {}
        computed = self.adaptive.computed_fraction
        cached = {} if computed is None else {"adaptive/flops_fraction_computed": computed}
        return {"adaptive/flops_fraction_spent": spent, **cached}

    def _restore(self, state: TrainerState) -> None:
        """Continue from the state of a resumed trainer, which has ours under the callback's class name."""
        stored: Any = state.stateful_callbacks
        saved = stored.setdefault(type(self).__name__, self.state())  # none in a checkpoint without callback
        saved = saved[0] if isinstance(saved, list) else saved
        progress = saved.get("attributes", {}).get("progress")
        if state.global_step == 0 or progress is None or progress["adaptive"] is None:
            return
        self._options.check_resumed(saved["args"])
        warn_of_other_torch(progress["torch"])
        if (kept := progress["with_state"]) is not None:
            assert self._training is not None
            forget_state_of_others(self._training.model, self._training.optimizer, kept)
        self.adaptive.load_state_dict(progress["adaptive"])
        self._progress = Progress(
            steps=progress["steps"],
            selected_at=progress["selected_at"],
            due=False,
            mid_epoch=not float(state.epoch or 0).is_integer(),
        )

    def _change(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)

    def _release(self) -> None:
        """Leave the model as it was before training."""
        training, self._training = self._training, None
        if training is not None:
            training.changes.close()

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, type(self))
        if self._options.labelled_logits:
            check_labels_stay(trainer)
        if self._options.compiled:
            check_uncompiled(trainer, type(self))

    def _release_after_failures_of(self, trainer: Trainer) -> None:
        """Wrap `trainer.train` so that a training that fails leaves the model as one that ends does.

        transformers has no event for a failure or an interruption.
        """
        train = trainer.train

        @functools.wraps(train)
        def guarded(*args: Any, **kwargs: Any) -> TrainOutput:
            try:
                return train(*args, **kwargs)
            finally:
                if self._training is not None and self._training.trainer is trainer:
                    self._release()

        trainer.train = guarded  # type: ignore[method-assign]

    def _trainer_of(self, state: TrainerState) -> Trainer:
        """The trainer whose event has this state: the attached one, unless another shares the callback."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None or trainer.state is not state:
            trainer = self._calling_trainer()
            self._trainer = weakref.ref(trainer)
        return trainer

    def _calling_trainer(self) -> Trainer:
        """Find the trainer that this event comes from, among the callers.

        transformers passes callbacks the model, the optimizer and the loaders, but not the trainer, whose
        loss, collator and loggers are needed. Without this search, every script would have to call `attach`.
        """
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and any(c is self for c in owner.callback_handler.callbacks):
                return owner
            frame = frame.f_back
        raise GTCompileError(
            f"{type(self).__name__} was not called by a transformers.Trainer that lists it as a callback; "
            f"call attach(trainer), or use gtcompile.AdaptiveBackprop in a loop of your own"
        )
