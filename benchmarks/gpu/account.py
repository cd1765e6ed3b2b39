"""What five epochs cost in all: everything that is done once, every selection, every step."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import compilation, steps
from benchmarks.gpu.candidates import EAGER, LORA, LORA_COMPILED, OURS, PLAIN
from benchmarks.gpu.records import Saved, results_of
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.sheet import Sheet, against
from gtcompile import backward_costs, compile_blocks, measure_importance
from gtcompile.tools.bench.measurement import seconds, spread

EPOCHS, STEPS = 5, 498
"""Of the paper's workload."""
BUDGET = "0.5"
BATCHES = 4
"""Batches on which importance is measured."""
TIMES = 3
SELECTION = 6.0
"""Most time of a selection on four batches, in ordinary full steps."""


def units(setting: Setting) -> list[str]:
    """One workload."""
    return [SHORT]


def measure(setting: Setting, name: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure what a selection takes; steps and compilation were measured by other stages."""
    workload = setting.workload(name)
    device, batch = workload.device, workload.batch()
    model = compile_blocks(workload.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    full = statistics.median(seconds(step, device) for _ in range(TIMES))
    captured = seconds(lambda: backward_costs(model, batch), device)
    batches = [batch] * BATCHES
    importance = [
        seconds(lambda: measure_importance(model, optimizer, batches), device) for _ in range(TIMES)
    ]
    yield {
        "full_step_s": full,
        "capture_s": captured,
        "importance_s": importance,
        "selection_s": setting.plan(name)["selection_s"],
    }


@dataclass(frozen=True, slots=True)
class Account:
    """What training with one way costs."""

    way: str
    once_s: float
    """Seconds before the first step, with a full cache: compilation, capture."""
    once_cold_s: float
    """The same with an empty cache."""
    epoch_s: float
    """Seconds before each epoch."""
    step_s: float

    def total_s(self, *, cold: bool) -> float:
        """Seconds of all epochs."""
        once = self.once_cold_s if cold else self.once_s
        return once + EPOCHS * (self.epoch_s + STEPS * self.step_s)

    def pays_after(self, other: "Account") -> float | None:
        """Steps after which this way has saved more than it cost beforehand; None if it never does.

        Both caches are empty; selections are spread over the steps of their epoch.
        """
        saved = other.step_s - self.step_s - self.epoch_s / STEPS
        return max(0.0, (self.once_cold_s - other.once_cold_s) / saved) if saved > 0 else None


def accounts(folder: Path, measured: Mapping[str, Any]) -> list[Account]:
    """The accounts of all ways whose steps were measured."""
    compiled = results_of(folder, "compilation")
    timed = results_of(folder, "steps").get(SHORT)
    if timed is None:
        return []
    ways = {
        OURS: (f"{OURS} at {BUDGET}", float(BUDGET)),
        EAGER: (f"{EAGER}, everything", 1.0),
        PLAIN: (f"{PLAIN}, everything", 1.0),
        LORA: (LORA, 1.0),
        LORA_COMPILED: (LORA_COMPILED, 1.0),
    }
    found = []
    for way, (called, budget) in ways.items():
        row = steps.find(timed, way, budget)
        caches = [compiled.get(f"{way}: {cache}") for cache in (compilation.WARM, compilation.COLD)]
        if row is None or (way in (OURS, PLAIN, LORA_COMPILED) and None in caches):
            continue
        warm, cold = (0.0 if cache is None else cache["seconds"] for cache in caches)
        once, epoch = (0.0, 0.0)
        if way == OURS:
            once = measured["capture_s"]
            epoch = statistics.median(measured["importance_s"]) + measured["selection_s"]
        found.append(Account(called, once + warm, once + cold, epoch, spread(row["step_s"]).median))
    return found


def sheet(saved: Saved) -> Sheet:
    """One row per way."""
    measured = saved.results.get(SHORT)
    if measured is None:
        return Sheet(title="Account", columns=("trained by",), rows=[])
    found = accounts(saved.folder, measured)
    columns = ("trained by", "once, s", "empty cache, s", "an epoch, s", "a step, ms")
    rows = [
        (
            a.way,
            f"{a.once_s:.1f}",
            f"{a.once_cold_s:.1f}",
            f"{a.epoch_s:.2f}",
            f"{a.step_s * 1e3:.1f}",
            f"{a.total_s(cold=False):.0f}",
            f"{a.total_s(cold=True):.0f}",
            "" if a is found[0] else _steps(found[0].pays_after(a)),
        )
        for a in found
    ]
    took = spread(s + measured["selection_s"] for s in measured["importance_s"])
    full_steps = took / measured["full_step_s"]
    return Sheet(
        title=f"Account of {EPOCHS} epochs of {STEPS} steps ({SHORT}), computed from what was measured",
        columns=(*columns, "all, s", "all, empty cache, s", "gtcompile pays after steps"),
        rows=rows,
        verdicts=[against(f"a selection on {BATCHES} batches, in full steps", full_steps, SELECTION)],
    )


def _steps(count: float | None) -> str:
    return "never" if count is None else f"{count:.0f}"
