"""Adaptive backpropagation in Lightning's Trainer, as a callback."""

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from gtcompile.errors import GTCompileError
from gtcompile.lightning.batches import measured_batches
from gtcompile.lightning.blocks import compile_children, uncompile_children
from gtcompile.lightning.compatibility import check_replicas, check_trainer
from gtcompile.lightning.framework import Callback, LightningModule, Trainer
from gtcompile.lightning.training_loss import TrainingLoss, check_loss, training_loss, untouched
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


@dataclass(frozen=True, slots=True)
class _Training:
    """The fit under way."""

    trainer: Trainer
    module: LightningModule
    loss: TrainingLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress(Progress):
    """How far one training has come, for a trainer without an event for optimizer steps."""

    epoch: int = -1
    """The epoch in which the present set was selected; -1 before the first selection."""
    at_step: int = 0
    """The trainer's number of steps when they were last counted."""


@dataclass(frozen=True, slots=True)
class _Options(CallbackOptions):
    """The options, with the seed that Lightning's trainer does not have."""

    seed: int = field(default=0, kw_only=True)
    """Of the measured examples and of policies that draw at random."""

    def __post_init__(self) -> None:
        CallbackOptions.__post_init__(self)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"expected seed to be a whole number, got {self.seed!r}")
        if self.prefix_cache is not False:
            raise ValueError(
                "prefix_cache works on the module that has the blocks, which is one inside of a "
                "LightningModule; create gtcompile.PrefixCache(that_module) before Trainer.fit"
            )
        if self.labelled_logits:
            raise ValueError(
                "labelled_logits needs the batches of transformers' Trainer; in a LightningModule call "
                "gtcompile.only_labelled_logits(that_model), and gtcompile.add_labelled_positions in the "
                "collator"
            )


class AdaptiveBackpropCallback(Callback):
    """Trains, within a FLOPs budget, the parameters that most reduce the loss; for Lightning's `Trainer`.

    `Trainer(..., callbacks=[AdaptiveBackpropCallback(0.5)])` is enough. When training begins, the callback
    compiles the repeated blocks of the modules in the LightningModule, and modules without repeated blocks as
    a whole. Then, and again every epoch or every so many steps, it computes costs and measures importance
    through the module's own `training_step` under the trainer's precision, on examples of the training data,
    and selects a new set to train. Nothing is logged meanwhile, and metrics do not count.
    The trainer's loggers receive the selection (`adaptive/...`) and its checkpoints contain it. When training
    ends, fails or is interrupted, the module is as it was before: not compiled, all parameters trainable that
    were.

    Args:
        budget_fraction: share of FLOPs, forward and backward, that a step may take, in (0, 1]. None is 0.5,
            or no limit if there is another budget.
        budget_seconds: seconds that a step may take, as for `AdaptiveBackprop`.
        budget_memory: bytes that training may take beside the weights, as for `AdaptiveBackprop`.
        budget_of: what the budget is a share of, "step" or "full_finetuning", as for `AdaptiveBackprop`.
        policy: how the set is selected, as for `AdaptiveBackprop`.
        every: select at each "epoch", or after this many optimizer steps.
        batches: number of batches of the loader's size that importance is measured on, at least 2 (1 with
            `two_pass`). They are drawn anew each time, and depend on `seed` and the step alone; a data set
            without a length gives its first examples.
        compiled: whether to compile; without it, parameters are frozen by `requires_grad_`.
        compiler: of the blocks' graphs, "inductor" or "eager".
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance within each batch, as the paper does, instead of across batches.
        frozen_state: where a frozen parameter's optimizer state goes: "keep" it, move it to host memory
            ("cpu"), or "drop" it.
        activation_memory_budget: share of the bytes saved for backward that the blocks may keep, in [0, 1];
            the backward recomputes the rest.
        seed: of the measured examples and of policies that draw at random; the same on all ranks.

    Raises:
        ValueError, TypeError: for arguments outside these ranges, and for `prefix_cache` and
            `labelled_logits`, which are for transformers' Trainer. `Trainer.fit` raises ValueError for what
            would undo the selection (manual optimization, DeepSpeed, FSDP, a module that is compiled
            already, another callback that freezes) and for a checkpoint of another model or other options.
        BudgetError: from `Trainer.fit`, when the budget trains nothing on this model; names the smallest
            budget that does.
    """

    @takes(_Options)
    def __init__(self, budget_fraction: float | None = None, **options: Any) -> None:
        self._options = _Options(budget_fraction, **options)
        self._progress = _Progress()
        self._training: _Training | None = None
        self._adaptive: AdaptiveBackprop | None = None
        self._loaded: dict[str, Any] = {}
        """The state of a checkpoint, until the training that continues it begins."""
        self._left: dict[str, Any] = {}
        """The state at the end of the latest training."""

    @property
    def adaptive(self) -> AdaptiveBackprop:
        """The selections and importances of the present or latest training.

        Raises:
            GTCompileError: before training.
        """
        if self._adaptive is None:
            raise GTCompileError("nothing is selected before training begins; call trainer.fit(...) first")
        return self._adaptive

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that would undo the selection, before any work is done."""
        if stage == "fit":
            self._release()
            self._loaded = {}  # a checkpoint to continue from is loaded after this
            check_trainer(trainer, pl_module, type(self), compiled=self._options.compiled)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse replicas that wait for frozen gradients; they exist only now."""
        check_replicas(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile the blocks; continue with a checkpoint's trained set if there is one."""
        options, loss = self._options, training_loss(trainer, pl_module)
        self._progress, self._left = _Progress(), {}
        self._adaptive = options.make_adaptive(
            trainer.model,  # type: ignore[arg-type] # no module only before the strategy is set up
            trainer.optimizers[0],
            steps=_steps(trainer),
            seed=options.seed,
            loss_fn=loss,
        )
        self._training = _Training(trainer, pl_module, loss)
        if options.compiled:
            compile_children(pl_module, options.compile_options)
        if self._loaded:
            self._restore(self._loaded)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Select a new set when one is due, before the first batch of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._is_due(trainer):
            self._reselect(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, count what it cost, and let the policy choose the next set."""
        if trainer.global_step > self._progress.at_step:
            self._change(at_step=trainer.global_step)
            self._progress = self._progress.after_step(self.adaptive.step_fraction)
            self.adaptive.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was spent; leave the module as it was before training."""
        if spent := self._progress.spent_numbers:
            _log(trainer, spent)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After a failure or an interruption, leave the module as it was before training."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as JSON types; empty before the first selection."""
        return self._left if self._training is None else self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint for the training that is about to continue it."""
        self._loaded = state_dict

    def _is_due(self, trainer: Trainer) -> bool:
        if self._options.every == "epoch":
            return self._progress.epoch != trainer.current_epoch
        selected_at, step = self._progress.selected_at, trainer.global_step
        return selected_at < 0 or (step % self._options.every == 0 and step != selected_at)

    def _reselect(self, trainer: Trainer, module: LightningModule) -> None:
        if self._training is None:
            raise used_by_another_training(self)
        seed = f"{self._options.seed} {trainer.global_step} {trainer.global_rank}"
        batches = measured_batches(trainer, module, self._options.batches, seed)
        with untouched(trainer, module):
            if self.adaptive.selection is None:
                batches = check_loss(self._training.loss, module, batches)
            selection = self.adaptive.reselect(batches, max_batches=None)
        self._change(
            selected_at=trainer.global_step, at_step=trainer.global_step, epoch=trainer.current_epoch
        )
        logger.info("step %d: %s", trainer.global_step, selection)
        _log(trainer, selection_numbers(selection) | self._progress.spent_numbers)

    def _state(self) -> dict[str, Any]:
        if self._progress.selected_at < 0:
            return {}
        return {
            "torch": str(torch.__version__),  # a type of its own, which a checkpoint would have to pickle
            "options": self._options.to_json(),
            "progress": dataclasses.asdict(self._progress),
            "adaptive": self.adaptive.state_dict(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self._options.check_resumed(saved["options"])
        warn_of_other_torch(saved["torch"])
        self.adaptive.load_state_dict(saved["adaptive"])
        self._progress = _Progress(**saved["progress"])

    def _change(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)

    def _release(self) -> None:
        """Leave the module as it was before training, and keep the state for checkpoints that follow."""
        training = self._training
        if training is None:
            return
        self._left, self._training, self._loaded = self._state(), None, {}
        if self._options.compiled:
            uncompile_children(training.module)
        train_only(training.module, None)


def _log(trainer: Trainer, numbers: dict[str, float]) -> None:
    """Hand numbers to the trainer's loggers at once, whatever `log_every_n_steps` is."""
    for each in trainer.loggers:
        each.log_metrics(numbers, step=trainer.global_step)


def _steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole training; None if it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None
