"""One run: a method, a budget, a learning rate, a seed and a number of steps; saved as it goes."""

import copy
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtcompile.compiler.blocks import compile_blocks, uncompile_blocks
from gtcompile.selection.policies import find_policy, for_training
from gtcompile.state.trained_set import trained_parameters
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.scores import scores_of
from gtcompile.tools.compare.setting import Costs, Setting, prepared
from gtcompile.tools.compare.text_batches import Batch
from gtcompile.tools.data.formats import Example
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.checkpoint import load_training, save_training

_CLIPPED_TO = 1.0
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is run; equal runs have equal results."""

    arm: str
    """Name in `ARMS`."""
    budget: float | None
    """Mean share of the FLOPs of full fine-tuning that a step may take, in (0, 1]; None without a budget."""
    learning_rate: float
    seed: int
    """Seed of the order of the data and of all random draws."""
    steps: int
    """Optimizer steps; the learning rate falls to 0 over them."""
    purpose: str
    """`search` (for a learning rate), or `steps` or `flops`: as many of these as the method `full`."""

    @property
    def key(self) -> str:
        """A name for files; `steps` and `flops` runs of the same length are the same run."""
        data = "search" if self.purpose == "search" else "test"
        budget = "all" if self.budget is None else self.budget
        return f"{self.arm}-{budget}-{self.learning_rate:g}-{self.seed}-{self.steps}-{data}"


def run(chosen: Run, setting: Setting, costs: Costs, unfinished: Path) -> dict[str, Any]:
    """Train and evaluate; continues from the last save in `unfinished`, if there is one.

    Args:
        chosen: what to run.
        setting: of the comparison.
        costs: of the methods.
        unfinished: a folder of this run's own; removed at the end.

    Returns:
        The run, its losses, scores and FLOPs as JSON types.
    """
    training = Training(chosen, setting, costs)
    training.resume(unfinished)
    while training.step < chosen.steps:
        training.advance()
        if training.step * setting.evaluations % chosen.steps < setting.evaluations:
            training.evaluate()
        if training.step % setting.save_every == 0 and training.step < chosen.steps:
            training.save(unfinished)
    if chosen.purpose != "search":
        training.score(setting.scored)
    shutil.rmtree(unfinished, ignore_errors=True)
    return training.result()


def loss_on(model: nn.Module, batches: Sequence[Batch], setting: Setting) -> float:
    """Mean loss per labelled token, in nats."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            labelled = int((batch["labels"][:, 1:] >= 0).sum())
            total += _loss(model, batch, setting).item() * labelled
            count += labelled
    model.train()
    return total / count


class Training:
    """An unfinished run."""

    def __init__(self, chosen: Run, setting: Setting, costs: Costs) -> None:
        began = time.perf_counter()
        torch.manual_seed(chosen.seed)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        self._run, self._setting, self._costs = chosen, setting, costs
        self._arm = arm = ARMS[chosen.arm]
        self._model = setting.model_for(arm)
        self._own_costs = own = costs.of(arm, setting.example(arm), self._model)
        if setting.compiler is not None:
            compile_blocks(self._model, compiler=setting.compiler)
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=chosen.learning_rate, weight_decay=_WEIGHT_DECAY)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, chosen.steps)
        budget = 1.0 if chosen.budget is None else chosen.budget * costs.full.full_flops / own.full_flops
        self._adaptive = AdaptiveBackprop(
            self._model,
            self._optimizer,
            min(budget, 1.0),
            policy=for_training(find_policy(arm.policy), chosen.steps),
            seed=chosen.seed,
            prefix_cache=arm.cached,
        )
        self.step = self._flops = self._measuring_flops = 0
        self._seconds = self._scoring_seconds = 0.0
        self._scores: dict[str, float] = {}
        self._evaluations: list[dict[str, float]] = []
        self._train_losses: list[float] = []
        self._data = self._batches()
        self._starting_seconds = time.perf_counter() - began

    @property
    def flops(self) -> int:
        """FLOPs of the steps so far."""
        return self._flops

    def resume(self, folder: Path) -> None:
        """Continue from what `save` wrote, if there is any."""
        if not folder.is_dir():
            return
        progress = load_training(folder, self._model, self._optimizer, self._adaptive)
        self._schedule.load_state_dict(progress.pop("schedule"))
        self.step = progress.pop("step")
        for name, value in progress.items():
            setattr(self, f"_{name}", value)
        self._data = islice(self._batches(), self.step, None)

    def save(self, folder: Path) -> None:
        """Save the state from which the run continues."""
        progress = {
            "step": self.step,
            "schedule": self._schedule.state_dict(),
            "flops": self._flops,
            "seconds": self._seconds,
            "measuring_flops": self._measuring_flops,
            "evaluations": copy.deepcopy(self._evaluations),
            "train_losses": list(self._train_losses),
        }
        save_training(folder, self._model, self._optimizer, self._adaptive, progress)

    def advance(self) -> None:
        """One optimizer step, with a selection before it when that is due."""
        began = time.perf_counter()
        if self._selects():
            self._select()
        batch = next(self._data)
        loss, saved_flops = self._forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _CLIPPED_TO)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        trained = trained_parameters(self._model)
        self._adaptive.step()
        self._train_losses.append(loss.item())
        self.step += 1
        self._seconds += time.perf_counter() - began
        own = self._costs.of(self._arm, batch, self._model)
        self._flops += own.step_flops(trained) - saved_flops

    def result(self) -> dict[str, Any]:
        """The finished run as JSON types."""
        return {
            **asdict(self._run),
            "key": self._run.key,
            "loss": self._evaluations[-1]["loss"],
            "scores": self._scores,
            "flops": self._flops,
            "measuring_flops": self._measuring_flops,
            "full_step_flops": self._costs.full.full_flops,
            "flops_fraction": self._flops / (self._costs.full.full_flops * self._run.steps),
            "seconds": self._seconds,
            "starting_seconds": self._starting_seconds,
            "scoring_seconds": self._scoring_seconds,
            "peak_memory_bytes": _peak_memory(self._setting.device),
            "evaluations": self._evaluations,
            "train_losses": self._train_losses,
            "parameters": sum(p.numel() for g in self._optimizer.param_groups for p in g["params"]),
            "torch": torch.__version__,
        }

    def _selects(self) -> bool:
        if self.step == 0:
            return True
        every = max(1, self._run.steps // self._setting.selections)
        return self._adaptive.policy.measured != "nothing" and self.step % every == 0

    def _select(self) -> None:
        texts, seed = self._setting.data.train, self._run.seed
        spare = self._setting.batches.training(texts, seed=1_000_003 * (seed + 1) + self.step)
        batches = [prepared(next(spare), self._arm) for _ in range(self._setting.measured)]
        with self._setting.autocast():
            self._adaptive.reselect(batches, max_batches=None)
        if self._adaptive.importance:
            passes = 2 if self._adaptive.policy.two_pass else 1
            flops = self._own_costs.step_flops(self._adaptive.importance)
            self._measuring_flops += passes * len(batches) * flops

    def evaluate(self) -> None:
        """Measure the loss on held-out texts."""
        batches = self._setting.batches.held_out(self._held_out()[: self._setting.held_out])
        self._evaluations.append(
            {
                "step": self.step,
                "flops": self._flops,
                "seconds": self._seconds,
                "loss": loss_on(self._model, batches, self._setting),
            }
        )

    def score(self, count: int) -> None:
        """Measure the metric of the data set on so many held-out texts; the model is compiled no longer."""
        if not count:
            return
        began = time.perf_counter()
        uncompile_blocks(self._model)
        self._scores = scores_of(
            self._model,
            self._held_out()[:count],
            self._setting.batches,
            self._setting.data.format.metric,
            self._setting.autocast(),
        )
        self._scoring_seconds = time.perf_counter() - began

    def _held_out(self) -> tuple[Example, ...]:
        data = self._setting.data
        return data.search if self._run.purpose == "search" else data.test

    def _batches(self) -> Iterator[Batch]:
        batches = self._setting.batches.training(self._setting.data.train, self._run.seed)
        return (prepared(batch, self._arm) for batch in batches)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The loss, and the FLOPs of what came from the cache of the frozen prefix."""
        cache = self._adaptive.prefix_cache
        hits = cache.stats.hits if cache else 0
        loss = _loss(self._model, batch, self._setting)
        if cache is None or cache.stats.hits == hits:
            return loss, 0
        return loss, self._adaptive.step_flops - self._adaptive.cached_step_flops


def _loss(model: nn.Module, batch: Batch, setting: Setting) -> torch.Tensor:
    moved = {name: tensor.to(setting.device) for name, tensor in batch.items()}
    with setting.autocast():
        loss: torch.Tensor = model(**moved).loss
    return loss


def _peak_memory(device: torch.device) -> int | None:
    """Bytes on an accelerator; None on the CPU, where processes share what is measured."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
