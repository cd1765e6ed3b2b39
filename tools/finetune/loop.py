"""The training loop: plan, step, write down, and stop or continue bit for bit at any step."""

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
from gtcompile.state.trained_set import train_only
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.finetune.methods import policy_for
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.run_report import RunReport
from gtcompile.tools.finetune.sigint import stop_between_steps
from gtcompile.tools.finetune.tensorboard_trace import TensorBoardTrace
from gtcompile.tools.runs.checkpoints import check_same_model
from gtcompile.tools.runs.preparation import Batch, Prepared
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.run_record import described_batch
from gtcompile.training.ddp import ranks_of

ALONE = Ranks(None)
MEASURED_BATCHES = 4
"""Batches whose importances are averaged, or all of a shorter epoch."""


class StoppedEarlyError(KeyboardInterrupt):
    """Ctrl-C: the run was stopped between two steps and can be resumed."""


class Training:
    """The state of one run between two steps.

    Args:
        prepared: model and examples.
        folder: where metrics, selections and checkpoints go.
        reporter: shows progress.
        trace: told of every selection and step.
        ranks: the processes that train together; each has batches of its own.
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
        self.policy = policy_for(settings, self.replicated, self.optimizer)
        self.report = RunReport(folder.path, reporter)
        self.selections: list[dict[str, Any]] = []
        self.steps = 0
        self.predicted_flops = 0
        self.counted_flops = 0
        self.seconds = {"training": 0.0, "selecting": 0.0}
        self.step_seconds: list[float] = []

    def run(self) -> None:
        """Train to the end, from wherever the state is.

        Raises:
            StoppedEarlyError: Ctrl-C; the checkpoint is written.
            GTCompileError: the budget is too small, or a count contradicts the prediction.
        """
        self.reporter.say(f"compiled: {self.compiled_as}")
        with stop_between_steps() as stop, self.reporter.training(self):
            while self.steps < self.total_steps:
                if self._plan_is_due():
                    self._make_plan()
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

    def _plan_is_due(self) -> bool:
        if not self.selections:
            return True
        begins = self.steps % self.prepared.steps_per_epoch == 0
        planned = self.selections[-1]["epoch"] == self.epoch
        due = self.epoch % self.prepared.settings.reselect_every == 0
        return self.policy.adapts and begins and due and not planned

    def _make_plan(self) -> None:
        started = time.perf_counter()
        batches = [self.prepared.batch(ids) for ids in self.prepared.epoch(self.epoch)[-MEASURED_BATCHES:]]
        plan = self.policy.plan(batches)
        measured = self.ranks.from_first(lambda: self._measure_step(batches[0], plan.step_flops))
        self.seconds["selecting"] += time.perf_counter() - started
        if not self.selections:
            described = described_batch(batches[0], self.prepared.collate.shape)
            self.folder.write_settings(
                self.prepared.settings, {**described, "examples": self.prepared.digest}
            )
        self.selections.append({"epoch": self.epoch, **plan.as_dict(), **measured})
        self.folder.write_selections(self.selections)
        self.save()
        self.reporter.planned(self.epoch, plan)
        if self.trace is not None:
            fqns = [name for name, _ in self.module.named_parameters()]
            self.trace.planned(self.steps, self.selections[-1], fqns)
        if self.folder.writes:
            self.report.write(self.module, batches[0])

    def _measure_step(self, batch: Batch, predicted_flops: int) -> dict[str, Any]:
        """Count and measure a step of this process with what is trained now."""
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
        """Take one step into the totals."""
        self.steps += 1
        self.step_seconds.append(passes)
        self.seconds["training"] += seconds
        self.predicted_flops += self.selections[-1]["step_flops"] * self.ranks.count
        self.counted_flops += self.selections[-1]["counted_step_flops"] * self.ranks.count

    @property
    def usual_step_seconds(self) -> float:
        """Median time of forward and backward: compilation is in few steps, and does not show."""
        return median(self.step_seconds)

    def save(self) -> None:
        """Write the checkpoint."""
        self.folder.save_state(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on, and what it has done so far; all ranks ask for it."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "policy": self.policy.state_dict(),
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
        check_same_model(self.module, state["model"], self.folder.checkpoint)
        check_random_state(state["random"][self.ranks.rank])
        self.folder.cut_metrics(state["steps"])
        self.load_state_dict(state)
        self.folder.write_selections(self.selections)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.policy.load_state_dict(state["policy"])
        for name in ("selections", "steps", "predicted_flops", "counted_flops", "seconds", "step_seconds"):
            setattr(self, name, state[name])
        train_only(self.model, self.selections[-1]["trained"])
        restore_random_state(state["random"][self.ranks.rank])


def compile_for_training(
    model: nn.Module, compiler: Literal["inductor", "eager"], memory_budget: float
) -> tuple[nn.Module, str]:
    """Compile repeated blocks where there are any, and otherwise the whole model.

    Returns:
        The model to train with, and what was done in words.
    """
    options: dict[str, Any] = {"compiler": compiler, "activation_memory_budget": memory_budget}
    blocks = list(find_blocks(model))
    if blocks:
        compile_blocks(model, blocks=blocks, **options)
        return model, f"{len(blocks)} blocks, weight gradients hoisted: another selection compiles nothing"
    options["differentiate"] = "loss"  # nothing else is, in `finetune`
    whole = torch.compile(model, backend="gtcompile", options=options, dynamic=False)
    return cast(nn.Module, whole), "the whole model, which has no repeated blocks: each selection is compiled"


def replicate(model: nn.Module) -> nn.Module:
    """The model with one replica in every process, of which trained gradients alone are sent."""
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    ranks_of(replicated)
    return replicated


def forward_and_backward(model: nn.Module, batch: Batch) -> float:
    """One step without the optimizer; waits for the device.

    Returns:
        The loss.
    """
    loss = loss_of(model(**batch))
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return loss.item()
