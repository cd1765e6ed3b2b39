"""What is recorded of every selection and every step of a run."""

import math
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from gtcompile.compiler.blocks import find_blocks
from gtcompile.costs.budgets import WHOLE, budget_flops
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError
from gtcompile.selection.selection import Selection
from gtcompile.tools.common.energy import joules_counter
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.step_comparison import FULL_DOES_NOT_FIT, StepComparison, compare_steps
from gtcompile.tools.finetune.step_counts import PassCounter, cache_paused, measure_steps
from gtcompile.tools.finetune.trainer_options import adaptive_callback
from gtcompile.tools.runs.preparation import MEASURED_BATCHES, Batch, Prepared
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.run_record import described_batch


class PlannedError(Exception):
    """The first selection is made, and no step shall be taken."""


class Recorder(TrainerCallback):
    """Writes every selection and every step to the run's folder, shows them, and stops between steps.

    Among the trainer's callbacks it comes before the one that selects.

    Args:
        prepared: model and examples.
        folder: for settings, metrics and selections.
        reporter: shows progress.
        ranks: the processes that train together; each has its own batches.
        resumed: whether the folder holds the beginning of this run.
        plan_only: raise `PlannedError` after the first selection; nothing is written.
    """

    trainer: Trainer
    """Set by `make_trainer`."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        reporter: Reporter,
        ranks: Ranks,
        *,
        resumed: bool = False,
        plan_only: bool = False,
    ) -> None:
        self.prepared, self.folder, self.reporter, self.ranks = prepared, folder, reporter, ranks
        self.adaptive, self._begun, self._plan_only = adaptive_callback(prepared), resumed, plan_only
        self.model: nn.Module = prepared.language.model
        self.selections: list[dict[str, Any]] = []
        self.comparison: StepComparison | None = None
        self._counter: PassCounter | None = None
        self.stop_requested = False
        """Whether Ctrl-C was pressed in this process."""
        self.stopping = False
        """Whether it was pressed in any, so that all stop."""
        self._spent = self._full = self._hits = 0
        self._step: dict[str, Any] = {}
        self._joules = joules_counter(prepared.device)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Continue the files of the run where the checkpoint was written, if there is one."""
        count = len(list(find_blocks(self.model)))
        what = f"{count} blocks" if count else "the whole model, which has no repeated blocks"
        self.reporter.say(f"compiled: {what}, weight gradients hoisted: a new selection compiles nothing")
        if self._begun:
            kept = self.ranks.from_first(lambda: self.folder.cut(state.global_step))
            self.selections = list(kept)
            for step in self.folder.metrics():
                self._add(step)
        if not self.selections:
            self.reporter.say(f"selecting: costs of a step, then importance on {MEASURED_BATCHES} batches")

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the record of the step, before a selection may be made for it."""
        sums = ("passes", "cached", "flops", "counted_flops", "full_flops", "tokens", "positions")
        self._step = {
            "step": state.global_step + 1,
            "epoch": int(state.epoch or 0),
            "loss": 0.0,
            "lr": kwargs["lr_scheduler"].get_last_lr()[0],
            "seconds": -perf_counter(),
            **dict.fromkeys(sums, 0),
        }
        if self._joules is not None:
            self._step["joules"] = -self._joules()

    @property
    def counter(self) -> PassCounter:
        """Counts passes of the training under way."""
        adaptive = self.adaptive.adaptive
        if self._counter is None or self._counter.adaptive is not adaptive:
            settings = self.prepared.settings
            adapted = settings.lora is not None
            self._counter = PassCounter(self.model, adaptive, recomputes=settings.recomputes, adapted=adapted)
        return self._counter

    def about_to_pass(self, batch: Batch) -> None:
        """Record the selection of the step to come, if it is new; count a pass at a new shape of batches."""
        if len(self.adaptive.adaptive.history) > len(self.selections):
            self._record(self.adaptive.adaptive.history[-1], self._step["seconds"])
            self._step["seconds"] = -perf_counter()
        if not self.counter.knows(batch):
            began = perf_counter()
            self.counter.count(self._on_device(batch) if self.prepared.collate.grouped else self._example())
            spent = perf_counter() - began
            self._step["seconds"] += spent
            self.selections[-1]["seconds"] += spent
            self.folder.write_selections(self.selections)

    def passed(self, loss: float, seconds: float, batch: Batch) -> None:
        """Note a forward and backward.

        Args:
            loss: of this process, as a share of the step's loss.
            seconds: that it took.
            batch: of this process.

        Raises:
            GTCompileError: the loss is not finite.
        """
        step = self._step
        loss = self.ranks.mean({"loss": loss})["loss"]
        if not math.isfinite(loss):
            raise GTCompileError(
                f"the loss became {loss} in step {step['step']}, and nothing was updated with it. "
                f"Lower --lr; the last checkpoint is in {self.folder.path}."
            )
        step["loss"] += loss
        step["passes"] += seconds
        hit, tokens = self._hit(), batch["attention_mask"]
        own = {"cached": int(hit), "tokens": int(tokens.sum()), "positions": tokens.numel()}
        own |= self.counter.taken(batch, hit=hit)
        for each in self.ranks.gather(own):
            for name, value in each.items():
                step[name] += value

    def _example(self) -> Batch:
        """A batch whose costs are known: the run's sample, or one that the selection was made on."""
        if self.prepared.collate.grouped:
            return self.prepared.sample()
        trainer = self.trainer
        loader = trainer.callback_handler.train_dataloader
        return self._on_device(next(self.adaptive.measured_batches(trainer.args, trainer.state, loader)))

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.prepared.device) for name, tensor in batch.items()}

    def _hit(self) -> bool:
        """Whether the latest forward of this process started from the prefix cache."""
        cache = self.adaptive.adaptive.prefix_cache
        if cache is None:
            return False
        hit, self._hits = cache.stats.hits > self._hits, cache.stats.hits
        return hit

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step; stop after it if Ctrl-C was pressed in any process."""
        self._step["seconds"] += perf_counter()
        if self._joules is not None:
            used = self._step["joules"] + self._joules()
            self._step["joules"] = self.ranks.total({"joules": used})["joules"]
        self._add(self._step)
        self.folder.add_metrics(self._step)
        spent, note = self._spent / self._full, f"{len(self.selections[-1]['trained'])} parameters"
        self.reporter.stepped(self._step, spent, state.max_steps, self.prepared.steps_per_epoch, note)
        if self.ranks.total({"stop": float(self.stop_requested)})["stop"] > 0:
            self.stopping = control.should_training_stop = True
        if control.should_training_stop or float(state.epoch or 0).is_integer():
            control.should_save = False  # `on_epoch_end` follows

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a checkpoint; if the epoch was cut short, without the evaluation that belongs to its end."""
        if self.stopping and not float(state.epoch or 0).is_integer():
            control.should_evaluate = False
        if self.stopping or args.save_strategy != "no":
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note that the checkpoint is whole; a kill may leave a part of the next one."""
        self.ranks.gather(None)  # every process has written its part
        self.folder.note_checkpoint(f"checkpoint-{state.global_step}")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the scores of an evaluation during training."""
        shown = (f"{k} {v:.4g}" for k, v in kwargs["metrics"].items() if not k.endswith("_per_second"))
        self.reporter.say(f"step {state.global_step}: {', '.join(shown)}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compare steps while the blocks are still compiled."""
        cut_short = self.stopping and state.global_step < state.max_steps
        settings = self.prepared.settings
        if not cut_short and (settings.policy != "full" or settings.lora is not None):
            self.compare(self.prepared.sample())

    def compare(self, batch: Batch) -> None:
        """Compare a step of the last selection with a full one of plain PyTorch; the first process does.

        A full step may not fit the memory, although the run does; then there is no comparison.
        """
        settings, last = self.prepared.settings, self.selections[-1]
        self.model.train()  # an evaluation may have come before

        def compared() -> StepComparison | None:
            try:
                return compare_steps(
                    self.model, batch, last, recomputes=settings.recomputes, adapted=settings.lora is not None
                )
            except torch.OutOfMemoryError:
                self.reporter.say(f"{FULL_DOES_NOT_FIT}, so steps are not compared with it")
                return None

        with cache_paused(self.adaptive.adaptive):
            self.comparison = self.ranks.from_first(compared)

    def _add(self, step: dict[str, Any]) -> None:
        self._spent += step["flops"]
        self._full += step["full_flops"]

    def _record(self, selection: Selection, began: float) -> None:
        """Count and measure a step of a new selection, write both and show the selection.

        If batches differ in shape, FLOPs in the record are those of the run's sample batch.
        """
        adaptive, batch, epoch = self.adaptive.adaptive, self._example(), self._step["epoch"]
        importance, costs = dict(adaptive.importance), adaptive.costs_of(batch)
        record = {
            "epoch": epoch,
            "step": self._step["step"] - 1,
            "trained": sorted(selection.trained),
            "selectable": selection.selectable,
            "step_flops": costs.step_flops,
            "budget_flops": budget_flops(costs.whole_flops, adaptive.budget_fraction),
            "full_flops": costs.full_flops,
            "whole_flops": costs.whole_flops,
            "predicted_seconds": selection.step_seconds,
            "predicted_bytes": selection.step_bytes,
            "cached_step_flops": costs.cached_step_flops,
            "importance": importance,
            "importance_bound": selection.importance_bound if importance else None,
        }
        record |= self.ranks.from_first(
            lambda: measure_steps(self.model, batch, self.counter, self.selections, record)
        )
        record["seconds"] = perf_counter() + began
        self.selections.append(record)
        count = f"{len(selection.trained)} of {selection.selectable} parameters"
        share = f"{selection.step_fraction:.1%} of {WHOLE[selection.budget_of]}"
        if selection.step_seconds is not None:
            share += f", {selection.step_seconds:.4f} s"
        if selection.step_bytes is not None:
            share += f", {selection.step_bytes / 1e6:,.1f} MB beside the weights"
        self.reporter.say(f"epoch {epoch + 1}: training {count}, {share}")
        if self._plan_only:
            self.compare(batch)
            raise PlannedError
        if not self._begun:
            described = described_batch(batch, self.prepared.collate.shape)
            self.folder.begin(self.prepared.settings, {**described, "examples": self.prepared.digest})
            self._begun = True
        self.folder.write_selections(self.selections)
