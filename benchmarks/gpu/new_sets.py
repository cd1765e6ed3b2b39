"""The first step with each of many new trained sets."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.candidates import EAGER, MAKERS, OURS
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.sheet import Sheet, against
from benchmarks.measurement import verdict
from benchmarks.switching import measure_switching
from benchmarks.workloads import random_sets
from gtcompile.tools.bench.measurement import spread

SETS, SEED = 20, 0
FIRST_STEP = 1.1
"""Most time of the median first step with a new set, in ordinary steps with that set."""


def units(setting: Setting) -> list[str]:
    """The ways whose trained set changes without compiling."""
    return [OURS, EAGER]


def measure(setting: Setting, way: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Switch from everything trained through random sets."""
    candidate = MAKERS[way](setting.subject(SHORT))
    names = [name for name, _ in candidate.model.named_parameters()]
    sets = [frozenset(names), *random_sets(names, 3 if setting.tiny else SETS, SEED)]
    device = setting.workload(SHORT).device
    yield dataclasses.asdict(measure_switching(way, candidate, sets, device))


def sheet(saved: Saved) -> Sheet:
    """One row per way."""
    results = saved.results
    rows = [
        (
            way,
            str(len(found["first_steps"])),
            str(spread(found["first_steps"])),
            str(found["done"]["captures"]),
            str(found["done"]["compiled"]),
            f"{found['ordinary_s'] * 1e3:.1f}",
        )
        for way, found in results.items()
    ]
    verdicts = []
    if ours := results.get(OURS):
        captures = sum(ours["done"].values())
        verdicts = [
            against("first step with a new set, in ordinary steps", spread(ours["first_steps"]), FIRST_STEP),
            f"captures and compilations after the first set, {captures}: {verdict(captures, 0)}",
        ]
    return Sheet(
        title=f"New sets: first steps in ordinary steps ({SHORT})",
        columns=("trained by", "sets", "first step", "captures", "compiled", "ordinary step, ms"),
        rows=rows,
        verdicts=verdicts,
    )
