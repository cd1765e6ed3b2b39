"""Joules per 1000 tokens, by the counter of the device."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.candidates import EAGER, FULL_ONLY, LORA_COMPILED, MAKERS, OURS, PLAIN
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import MAIN, Setting
from benchmarks.gpu.sheet import Sheet
from gtcompile.tools.bench.measurement import spread, wait_for
from gtcompile.tools.bench.steady_state import SteadyState
from gtcompile.tools.common.energy import joules_counter

WAYS = (OURS, EAGER, PLAIN, LORA_COMPILED)
BUDGETS = (1.0, 0.5)
WINDOW_S = 1.0
"""Least seconds of steps between two readings: the counter is renewed every 0.1 s or so."""
ROUNDS = (2, 5)
"""Fewest and most rounds; the ways take turns."""


def units(setting: Setting) -> list[str]:
    """One workload."""
    return [MAIN]


def measure(setting: Setting, name: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure in turns; yields everything so far after each round."""
    read = joules_counter(setting.device)
    if read is None:
        yield {"unavailable": f"{setting.device} has no counter of energy", "trials": []}
        return
    workload, subject = setting.workload(name), setting.subject(name)
    candidates = {way: MAKERS[way](subject) for way in WAYS}
    steady = SteadyState(candidates, setting.selections(name), full_only=FULL_ONLY)
    trials = {trial: list[float]() for trial in steady.trials if trial.budget in BUDGETS}
    tokens = workload.rows * workload.length
    for done in range(ROUNDS[1]):
        started = time.monotonic()
        for trial, found in trials.items():
            steady.prepare(trial.budget, trial.candidate)
            step = steady.candidates[trial.candidate].step
            found.append(_joules_of_a_step(step, read, workload.device) / tokens * 1000)
        rows = [
            {"candidate": trial.candidate, "budget": trial.budget, "joules": found}
            for trial, found in trials.items()
        ]
        yield {"unavailable": "", "trials": rows}
        if done + 1 >= ROUNDS[0] and 2 * time.monotonic() - started > deadline:
            return


def _joules_of_a_step(step: Callable[[], object], read: Callable[[], float], device: torch.device) -> float:
    wait_for(device)
    start, before, steps = time.monotonic(), read(), 0
    while time.monotonic() - start < WINDOW_S:
        step()
        wait_for(device)
        steps += 1
    return (read() - before) / steps


def sheet(saved: Saved) -> Sheet:
    """One row per way and budget."""
    results = saved.results
    rows, remarks = [], []
    for found in results.values():
        remarks += [found["unavailable"]] if found["unavailable"] else []
        for row in found["trials"]:
            rows.append((row["candidate"], f"{row['budget']:g}", str(spread(row["joules"]))))
    return Sheet(
        title=f"Energy ({MAIN})",
        columns=("trained by", "budget", "joules per 1000 tokens"),
        rows=rows,
        verdicts=remarks,
    )
