"""The stages in the order in which they run, most telling first."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.gpu import (
    account,
    compilation,
    correctness,
    energy,
    kernels,
    memory,
    new_sets,
    plans,
    quality,
    steps,
    two_gpus,
)
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.sheet import Sheet


class Measurement(Protocol):
    """A module of this package that measures something."""

    __name__: str

    def units(self, setting: Setting, /) -> Sequence[str]:
        """What is measured and kept one by one."""

    def measure(self, setting: Setting, unit: str, deadline: float, /) -> Iterator[Any]:
        """Measure one of them until a deadline by `time.monotonic()`; yields its result, which may grow."""

    def sheet(self, saved: Saved, /) -> Sheet:
        """The table of the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """When and how long a module measures."""

    name: str
    module: Measurement
    weight: int
    """Share of the time that the stage may take; seconds of eight minutes."""
    workers: int = 1
    """How many units are measured at a time; more than 1 only where time is not what is measured."""
    needs: tuple[str, ...] = ()
    """Stages whose results it reads."""

    @property
    def processes(self) -> int:
        """How many units are measured at a time on this machine."""
        return max(1, min(self.workers, len(os.sched_getaffinity(0))))


CROWD = 12
"""Processes that check or compile small models, with one thread each."""


def _stage(module: Measurement, weight: int, *, workers: int = 1, needs: tuple[str, ...] = ()) -> Stage:
    name = module.__name__.rpartition(".")[2]
    return Stage(name=name, module=module, weight=weight, workers=workers, needs=needs)


_ALL = (
    _stage(correctness, 75, workers=CROWD),
    _stage(plans, 55, workers=CROWD),
    _stage(steps, 160, needs=("plans",)),
    _stage(new_sets, 20, needs=("plans",)),
    _stage(compilation, 40, workers=3, needs=("plans",)),
    _stage(account, 20, needs=("plans", "steps", "compilation")),
    _stage(memory, 20, needs=("plans",)),
    _stage(two_gpus, 25, needs=("plans",)),
    _stage(energy, 20, needs=("plans",)),
    _stage(quality, 30),
    _stage(kernels, 15, needs=("plans",)),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _ALL}
"""By name, in order."""


def with_needs(names: Sequence[str]) -> list[str]:
    """The stages and all stages whose results they read, in order."""
    wanted = set(names)
    for name in reversed(list(STAGES)):  # a stage needs earlier ones only
        if name in wanted:
            wanted.update(STAGES[name].needs)
    return [name for name in STAGES if name in wanted]


def measure_unit(setting: Setting, stage_name: str, unit: str, deadline: float) -> Iterator[Any]:
    """Measure one unit in a process of its own, whose output goes to a log in the folder."""
    setting.log_output()
    stage = STAGES[stage_name]
    print(f"--- {stage_name}: {unit}", flush=True)
    if stage.workers == CROWD:
        torch.set_num_threads(1)
        torch._inductor.config.compile_threads = 1
    yield from stage.module.measure(setting, unit, deadline)
