"""The stages in the order in which they run, most telling first."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
)
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.sheet import Sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One thing that is measured, in units that are measured and kept one by one."""

    name: str
    units: Callable[[Setting], Sequence[str]]
    measure: Callable[[Setting, str, float], Iterator[Any]]
    """Takes the setting, a unit and a deadline by `time.monotonic()`; yields its result, which may grow."""
    sheet: Callable[[Saved], Sheet]
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
_ALL = (
    Stage(
        name="correctness",
        units=correctness.units,
        measure=correctness.measure,
        sheet=correctness.sheet,
        weight=80,
        workers=CROWD,
    ),
    Stage(
        name="plans",
        units=plans.units,
        measure=plans.measure,
        sheet=plans.sheet,
        weight=60,
        workers=CROWD,
    ),
    Stage(
        name="steps",
        units=lambda setting: setting.workloads,
        measure=steps.measure,
        sheet=steps.sheet,
        weight=160,
        needs=("plans",),
    ),
    Stage(
        name="new_sets",
        units=new_sets.units,
        measure=new_sets.measure,
        sheet=new_sets.sheet,
        weight=20,
        needs=("plans",),
    ),
    Stage(
        name="compilation",
        units=compilation.units,
        measure=compilation.measure,
        sheet=compilation.sheet,
        weight=40,
        workers=3,
        needs=("plans",),
    ),
    Stage(
        name="account",
        units=account.units,
        measure=account.measure,
        sheet=account.sheet,
        weight=20,
        needs=("plans", "steps", "compilation"),
    ),
    Stage(
        name="memory",
        units=memory.units,
        measure=memory.measure,
        sheet=memory.sheet,
        weight=25,
        needs=("plans",),
    ),
    Stage(
        name="energy",
        units=energy.units,
        measure=energy.measure,
        sheet=energy.sheet,
        weight=25,
        needs=("plans",),
    ),
    Stage(
        name="quality",
        units=quality.units,
        measure=quality.measure,
        sheet=quality.sheet,
        weight=35,
    ),
    Stage(
        name="kernels",
        units=kernels.units,
        measure=kernels.measure,
        sheet=kernels.sheet,
        weight=15,
        needs=("plans",),
    ),
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
    with (setting.output / "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    stage = STAGES[stage_name]
    print(f"--- {stage_name}: {unit}", flush=True)
    if stage.workers == CROWD:
        torch.set_num_threads(1)
        torch._inductor.config.compile_threads = 1
    yield from stage.measure(setting, unit, deadline)
