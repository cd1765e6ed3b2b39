"""The training loop: select, step, record; a run stops and continues at any step, bit for bit."""

import math
import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from gtcompile.capture.model_io import loss_of
from gtcompile.capture.rng import check_random_state, random_state, restore_random_state
from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError
from gtcompile.state.same_model import check_same_model, shapes_of
from gtcompile.state.trained_set import train_only
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.finetune.methods import method_for, selection_record
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.run_report import RunReport
from gtcompile.tools.finetune.sigint import stop_between_steps
from gtcompile.tools.finetune.tensorboard_trace import TensorBoardTrace
from gtcompile.tools.runs.preparation import Batch, Prepared
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.run_record import described_batch
from gtcompile.training.ddp import ranks_of

ALONE = Ranks(None)
MEASURED_BATCHES = 4
"""Batches whose importances are averaged; all of them if the epoch has fewer."""


class StoppedEarlyError(KeyboardInterrupt):
    """The run was stopped between two steps with Ctrl-C and can be resumed."""


class Training:
    """The state of one run between two steps.

    Args:
        prepared: model and examples.
        folder: for metrics, selections and checkpoints.
        reporter: shows progress.
        trace: records every selection and step.
        ranks: the processes that train together; each has its own batches.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        reporter: Reporter,
        trace: TensorBoardTrace | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        settings = prepared.settings
        self.ranks = ranks
        self.prepared, self.folder, self.reporter, self.trace = prepared, folder, reporter, trace
        self.module: nn.Module = prepared.language.model
        self.model, self.compiled_as = compile_for_training(
            self.module, settings.compiler, settings.activation_memory_budget
        )
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.total_steps = prepared.steps_per_epoch * settings.epochs
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, self.total_steps)
        self.replicated = replicate(self.model) if ranks.count > 1 else self.model
        self.method = method_for(settings, self.replicated, self.optimizer)
        self.report = RunReport(folder.path, reporter)
        self.selections: list[dict[str, Any]] = []
        self.steps = 0
        self.predicted_flops = 0
        self.counted_flops = 0
        self.seconds = {"training": 0.0, "selecting": 0.0}
        self.step_seconds: list[float] = []

    def run(self) -> None:
        """Train from the current state to the end.

        Raises:
            StoppedEarlyError: Ctrl-C was pressed; the checkpoint is written.
            GTCompileError: the budget is too small, or a count contradicts the prediction.
        """
        self.reporter.say(f"compiled: {self.compiled_as}")
        with stop_between_steps() as stop, self.reporter.training(self):
            while self.steps < self.total_steps:
                if self._selection_is_due():
                    self._select()
                self._step()
                epoch_ends = self.steps % self.prepared.steps_per_epoch == 0
                stopping = self.ranks.total({"stop": float(stop.requested)})["stop"] > 0
                if epoch_ends or stopping or self.steps % self.prepared.settings.checkpoint_every == 0:
                    self.save()
                if stopping and self.steps < self.total_steps:
                    raise StoppedEarlyError(f"stopped after step {self.steps} of {self.total_steps}")

    @property
    def epoch(self) -> int:
        """Index of the current epoch."""
        return self.steps // self.prepared.steps_per_epoch

    def _selection_is_due(self) -> bool:
        if not self.selections:
            return True
        begins = self.steps % self.prepared.steps_per_epoch == 0
        done = self.selections[-1]["epoch"] == self.epoch
        due = self.epoch % self.prepared.settings.reselect_every == 0
        return self.method.adapts and begins and due and not done

    def _select(self) -> None:
        started = time.perf_counter()
        batches = [self.prepared.batch(ids) for ids in self.prepared.epoch(self.epoch)[-MEASURED_BATCHES:]]
        selection = self.method.select(batches)
        measured = self.ranks.from_first(lambda: self._measure_step(batches[0], selection.step_flops))
        self.seconds["selecting"] += time.perf_counter() - started
        if not self.selections:
            described = described_batch(batches[0], self.prepared.collate.shape)
            self.folder.write_settings(
                self.prepared.settings, {**described, "examples": self.prepared.digest}
            )
        record = selection_record(selection, self.method.importance)
        self.selections.append({"epoch": self.epoch, **record, **measured})
        self.folder.write_selections(self.selections)
        self.save()
        self.reporter.selected(self.selections[-1])
        if self.trace is not None:
            fqns = [name for name, _ in self.module.named_parameters()]
            self.trace.selected(self.steps, self.selections[-1], fqns)
        if self.folder.writes:
            self.report.write(self.module, batches[0])

    def _measure_step(self, batch: Batch, predicted_flops: int) -> dict[str, Any]:
        """Count and measure a step of this process with the current trained set."""
        recomputes = self.prepared.settings.recomputes
        counted = check_step_flops(self.model, batch, predicted_flops, recomputes=recomputes)
        memory = passes_memory(self.model, batch, self.prepared.device)
        return {"counted_step_flops": counted, **memory.as_dict()}

    def _step(self) -> None:
        index = self.steps % self.prepared.steps_per_epoch
        batch = self.prepared.batch(self.prepared.epoch(self.epoch)[index])
        epoch, lr, started = self.epoch, self.scheduler.get_last_lr()[0], time.perf_counter()
        loss = self.ranks.mean({"loss": forward_and_backward(self.replicated, batch)})["loss"]
        passes = time.perf_counter() - started
        self._expect_finite(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        self._note(passes, seconds)
        record = {"step": self.steps, "epoch": epoch, "loss": loss, "lr": lr, "seconds": seconds}
        record["flops"] = self.selections[-1]["step_flops"] * self.ranks.count
        self.folder.add_metrics(record)
        if self.trace is not None:
            self.trace.stepped(record)
        self.reporter.stepped(self, loss, seconds)

    def _expect_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise GTCompileError(
                f"the loss became {loss} in step {self.steps}, and nothing was updated with it. "
                f"Lower --lr; the last checkpoint is in {self.folder.path}."
            )

    def _note(self, passes: float, seconds: float) -> None:
        """Add one step to the totals."""
        self.steps += 1
        self.step_seconds.append(passes)
        self.seconds["training"] += seconds
        self.predicted_flops += self.selections[-1]["step_flops"] * self.ranks.count
        self.counted_flops += self.selections[-1]["counted_step_flops"] * self.ranks.count

    @property
    def usual_step_seconds(self) -> float:
        """Median time of forward and backward; the few steps that compile do not change it."""
        return median(self.step_seconds)

    def save(self) -> None:
        """Write the checkpoint."""
        self.folder.save_state(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The state from which the run continues, with its totals so far; a collective call of all ranks."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "random": self.ranks.gather(random_state()),
            "selections": self.selections,
            "steps": self.steps,
            "predicted_flops": self.predicted_flops,
            "counted_flops": self.counted_flops,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
        }

    def resume(self) -> None:
        """Continue from the checkpoint in the folder.

        Raises:
            ValueError: there is no checkpoint, or it is of another model.
        """
        state = self.folder.load_state()
        what = f"{self.folder.checkpoint} is a checkpoint"
        check_same_model(shapes_of(state["model"]), shapes_of(self.module.state_dict()), what)
        check_random_state(state["random"][self.ranks.rank])
        self.folder.cut_metrics(state["steps"])
        self.load_state_dict(state)
        self.folder.write_selections(self.selections)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.method.load_state_dict(state["method"])
        for name in ("selections", "steps", "predicted_flops", "counted_flops", "seconds", "step_seconds"):
            setattr(self, name, state[name])
        train_only(self.model, self.selections[-1]["trained"])
        restore_random_state(state["random"][self.ranks.rank])


def compile_for_training(
    model: nn.Module, compiler: Literal["inductor", "eager"], memory_budget: float
) -> tuple[nn.Module, str]:
    """Compile repeated blocks if there are any, or else the whole model.

    Returns:
        The model to train with, and a description of what was compiled.
    """
    options: dict[str, Any] = {"compiler": compiler, "activation_memory_budget": memory_budget}
    blocks = list(find_blocks(model))
    if blocks:
        compile_blocks(model, blocks=blocks, **options)
        return model, f"{len(blocks)} blocks, weight gradients hoisted: a new selection compiles nothing"
    options["differentiate"] = "loss"  # `finetune` differentiates nothing else
    whole = torch.compile(model, backend="gtcompile", options=options, dynamic=False)
    return cast(nn.Module, whole), "the whole model, which has no repeated blocks: each selection is compiled"


def replicate(model: nn.Module) -> nn.Module:
    """Replicate the model in every process; only trained gradients are sent."""
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    ranks_of(replicated)
    return replicated


def forward_and_backward(model: nn.Module, batch: Batch) -> float:
    """Run forward and backward, and wait for the device.

    Returns:
        The loss.
    """
    loss = loss_of(model(**batch))
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return loss.item()
