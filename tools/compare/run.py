"""One run: a method, a budget, a learning rate, a seed and a number of steps; saved as it goes."""

import contextlib
import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtcompile.compiler.blocks import compile_blocks
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.huggingface.labelled_logits import add_labelled_positions, only_labelled_logits
from gtcompile.selection.policies import find_policy, for_training
from gtcompile.state.trained_set import trained_parameters
from gtcompile.tools.compare.arms import ARMS, unchanged
from gtcompile.tools.compare.text_batches import Batch, Batches, Data, Text
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.checkpoint import load_training, save_training
from gtcompile.training.prefix_cache import PrefixCache

_CLIPPED_TO = 1.0
_WEIGHT_DECAY = 0.01
_POSITIONS = 64
"""Labelled positions are rounded up to a multiple of this, so that nearly all batches have one shape."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs of a comparison have in common."""

    load: Callable[[], nn.Module]
    """Returns the pretrained model, a new copy at every call."""
    batches: Batches
    data: Data
    held_out: int
    """Number of held-out texts on which the loss is measured."""
    evaluations: int
    """How often a run measures this loss."""
    selections: int
    """How often a run selects, if its policy measures importance."""
    measured: int
    """Batches on which each selection measures importance."""
    bf16: bool
    """Whether forwards run under bf16 autocast."""
    compiler: str | None
    """The compiler of the blocks; None runs them eagerly."""
    save_every: int
    """Steps between two saves of an unfinished run."""
    device: torch.device


def run(chosen: Run, setting: Setting, full: BackwardCosts, unfinished: Path) -> dict[str, Any]:
    """Train and evaluate; continues from the last save in `unfinished`, if there is one.

    Args:
        chosen: what to run.
        setting: of the comparison.
        full: costs of full fine-tuning.
        unfinished: a folder of this run's own; removed at the end.

    Returns:
        The run, its losses and FLOPs as JSON types.
    """
    training = _Training(chosen, setting, full)
    training.resume(unfinished)
    while training.step < chosen.steps:
        training.advance()
        if training.step % setting.save_every == 0 and training.step < chosen.steps:
            training.save(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
    return training.result()


def full_costs(setting: Setting) -> BackwardCosts:
    """Costs of full fine-tuning of the model at the comparison's batches."""
    return backward_costs(setting.load(), _example(setting))


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


class _Training:
    """An unfinished run."""

    def __init__(self, chosen: Run, setting: Setting, full: BackwardCosts) -> None:
        torch.manual_seed(chosen.seed)
        self._run, self._setting, self._full = chosen, setting, full
        arm = ARMS[chosen.arm]
        self._model = arm.prepare(setting.load()).to(setting.device)
        self._labelled = arm.labelled
        if arm.labelled:
            only_labelled_logits(self._model)
        example = self._prepared(_example(setting))
        plain = arm.prepare is unchanged and not arm.labelled
        own = full if plain else backward_costs(self._model, example)
        if setting.compiler is not None:
            compile_blocks(self._model, compiler=setting.compiler)
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=chosen.learning_rate, weight_decay=_WEIGHT_DECAY)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, chosen.steps)
        budget = 1.0 if chosen.budget is None else chosen.budget * full.full_flops / own.full_flops
        policy = for_training(find_policy(arm.policy), chosen.steps)
        self._adaptive = AdaptiveBackprop(
            self._model, self._optimizer, min(budget, 1.0), policy=policy, seed=chosen.seed
        )
        self._own_costs, self._costs_of = own, {(_shape(example), 0): own}
        self._cache = PrefixCache(self._model) if arm.cached else None
        self.step = self._flops = self._measuring_flops = 0
        self._seconds = 0.0
        self._evaluations: list[dict[str, float]] = []
        self._train_losses: list[float] = []
        self._data = self._batches()

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
        """One optimizer step, with a selection before it and an evaluation after it when they are due."""
        began = time.perf_counter()
        if self._selects():
            self._select()
        batch = next(self._data)
        loss, skipped = self._forward(batch)
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
        self._flops += self._costs(batch, skipped, trained)
        if self.step * self._setting.evaluations % self._run.steps < self._setting.evaluations:
            self._evaluate()

    def result(self) -> dict[str, Any]:
        """The finished run as JSON types."""
        return {
            **asdict(self._run),
            "key": self._run.key,
            "loss": self._evaluations[-1]["loss"],
            "flops": self._flops,
            "measuring_flops": self._measuring_flops,
            "full_step_flops": self._full.full_flops,
            "flops_fraction": self._flops / (self._full.full_flops * self._run.steps),
            "seconds": self._seconds,
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
        batches = [self._prepared(next(spare)) for _ in range(self._setting.measured)]
        with _autocast(self._setting):
            self._adaptive.reselect(batches, max_batches=None)
        if self._adaptive.importance:
            passes = 2 if self._adaptive.policy.two_pass else 1
            flops = self._own_costs.step_flops(self._adaptive.importance)
            self._measuring_flops += passes * len(batches) * flops

    def _evaluate(self) -> None:
        texts = self._held_out()
        batches = self._setting.batches.held_out(texts, self._setting.held_out)
        self._evaluations.append(
            {
                "step": self.step,
                "flops": self._flops,
                "seconds": self._seconds,
                "loss": loss_on(self._model, batches, self._setting),
            }
        )

    def _held_out(self) -> tuple[Text, ...]:
        data = self._setting.data
        return data.search if self._run.purpose == "search" else data.test

    def _batches(self) -> Iterator[Batch]:
        return map(self._prepared, self._setting.batches.training(self._setting.data.train, self._run.seed))

    def _prepared(self, batch: Batch) -> Batch:
        return add_labelled_positions(batch, multiple=_POSITIONS) if self._labelled else batch

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The loss, and how many blocks of the forward came from the cache."""
        if self._cache is None:
            return _loss(self._model, batch, self._setting), 0
        hits = self._cache.stats.hits
        loss = _loss(self._model, batch, self._setting)
        return loss, self._cache.stats.depth if self._cache.stats.hits > hits else 0

    def _costs(self, batch: Batch, skipped: int, trained: frozenset[str]) -> int:
        """FLOPs of a step; captured once for each number of labelled positions and of skipped blocks."""
        key = (_shape(batch), skipped)
        if key not in self._costs_of:
            hit = self._cache.pretend_hit() if self._cache and skipped else contextlib.nullcontext()
            with hit:
                self._costs_of[key] = backward_costs(self._model, batch)
        return self._costs_of[key].step_flops(trained)


def _shape(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in batch.values())


def _example(setting: Setting) -> Batch:
    """Any batch: all have one shape, except for labelled positions."""
    return setting.batches.batch(setting.data.train[: setting.batches.size])


def _loss(model: nn.Module, batch: Batch, setting: Setting) -> torch.Tensor:
    moved = {name: tensor.to(setting.device) for name, tensor in batch.items()}
    with _autocast(setting):
        loss: torch.Tensor = model(**moved).loss
    return loss


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes on an accelerator; None on the CPU, where processes share what is measured."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
