"""Trains on every rank, saves, and continues from what was saved; started by torchrun.

`torchrun --nproc-per-node N -m tests.ranks.training_state_run WRAPPER resume FOLDER` compares a continued
training with one that never stopped, bit for bit. `... continue FOLDER` continues, on any number of ranks,
from what `resume` left. `... save FOLDER` saves after every step until it is killed. `... full FOLDER` saves
to a full disk.
"""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile import (
    AdaptiveBackprop,
    GTCompileError,
    compile_blocks,
    load_training,
    save_training,
    trained_parameters,
)
from gtcompile.capture.model_io import unwrap
from tests.ranks.data_parallel_run import build, draw
from tests.ranks.fully_sharded_run import joined, shard
from tests.ranks.gloo_ranks import gloo_ranks

PARTS, EVERY, TOTAL = 2, 3, 10
POINTS = {"before": (6, False), "after": (6, True), "middle": (5, True)}
"""The step a training stops before, and whether what is trained from it on has been selected."""


class Training:
    """A loop that selects anew every few steps, as a user would write it."""

    def __init__(self, wrapper: str, seed: int = 0) -> None:
        module = build(seed)
        compile_blocks(module, compiler="eager")
        if wrapper == "sharded":
            self.model: nn.Module = shard(module, set())
        else:
            self.model = DistributedDataParallel(module, find_unused_parameters=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.adaptive = AdaptiveBackprop(self.model, self.optimizer, 0.6)
        self.step, self.selected = 0, False

    def go_on(self, until: int = TOTAL, *, select: bool = False) -> None:
        while self.step < until:
            self.select_if_due()
            self.model(**self.batch(self.step)).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step, self.selected = self.step + 1, False
        if select:
            self.select_if_due()

    def select_if_due(self) -> None:
        if self.step % EVERY == 0 and not self.selected:
            self.adaptive.reselect([self.batch(1000 + self.step + i) for i in range(2)])
        self.selected = True

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """This rank's share of the parts."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return joined(draw(7, number, PARTS)[rank::ranks])

    def save(self, folder: Path) -> None:
        progress = {"step": self.step, "selected": self.selected, "lr": self.scheduler.state_dict()}
        save_training(folder, self.model, self.optimizer, self.adaptive, progress)

    def load(self, folder: Path) -> None:
        progress = load_training(folder, self.model, self.optimizer, self.adaptive)
        self.step, self.selected = progress["step"], progress["selected"]
        self.scheduler.load_state_dict(progress["lr"])

    def outcome(self) -> dict[str, Any]:
        """Whole weights and moments, and what is trained."""
        weights = unwrap(self.model).state_dict()
        moments = {
            f"{n}.{key}": value
            for n, p in unwrap(self.model).named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        tensors = {name: whole(tensor) for name, tensor in (weights | moments).items()}
        return tensors | {
            "trained": sorted(trained_parameters(self.model)),
            "lr": self.scheduler.get_last_lr(),
        }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], **tolerances: float) -> None:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    torch.testing.assert_close(
        *({k: v for k, v in each.items() if k != "trained"} for each in (ours, theirs)), **tolerances
    )
    assert ours["trained"] == theirs["trained"]


def resume(wrapper: str, folder: Path) -> None:
    uninterrupted = Training(wrapper)
    uninterrupted.go_on()
    expected = uninterrupted.outcome()
    for point, (step, selected) in POINTS.items():
        first = Training(wrapper)
        first.go_on(step, select=selected)
        first.save(folder / point)
        again = Training(wrapper, seed=1)
        again.load(folder / point)
        again.go_on()
        assert_equal(again.outcome(), expected, rtol=0, atol=0)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def continue_(wrapper: str, folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    for point in POINTS:
        again = Training(wrapper, seed=1)
        again.load(folder / point)
        again.go_on()
        assert_equal(again.outcome(), expected, rtol=1e-3, atol=1e-5)


def save(wrapper: str, folder: Path) -> None:
    training = Training(wrapper)
    print(f"pid {os.getpid()}", flush=True)
    while True:
        training.go_on(training.step + 1)
        training.save(folder)
        if dist.get_rank() == 0:
            print(f"saved {training.step}", flush=True)


def full(wrapper: str, folder: Path) -> None:
    training = Training(wrapper)
    training.go_on(2)
    training.save(folder)
    training.go_on(4)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        training.save(folder)
    except GTCompileError as error:
        print(f"rank {dist.get_rank()}: {error}", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = Training(wrapper, seed=1)
    again.load(folder)
    assert again.step == 2
    training.save(folder)
    again.load(folder)
    assert_equal(again.outcome(), training.outcome(), rtol=0, atol=0)


def main(wrapper: str, task: str, folder: str) -> None:
    """Run one task on every rank."""
    with gloo_ranks():
        tasks = {"resume": resume, "continue": continue_, "save": save, "full": full}
        tasks[task](wrapper, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
