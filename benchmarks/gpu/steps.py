"""Ordinary steps of every way at several budgets: time, host time, memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.candidates import (
    EAGER,
    FULL_ONLY,
    LORA,
    LORA_COMPILED,
    MAKERS,
    OURS,
    PLAIN,
    refusal,
    ways_of,
)
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import BELOW_ONE_BILLION, Setting
from benchmarks.gpu.sheet import Sheet, against
from benchmarks.measurement import release_memory
from gtcompile.errors import GTCompileError
from gtcompile.graph.flops import count_flops
from gtcompile.tools.bench.measurement import Spread, ratios, spread, wait_for
from gtcompile.tools.bench.steady_state import SteadyState, Trial
from gtcompile.tools.common.step_memory import peak_bytes

ROUNDS = (3, 7)
"""Fewest and most rounds; each way takes one turn in a round."""
STEPS = 3
"""Steps of one turn, queued one behind the other as in training."""
FULL_STEP = 1.02
"""Most time of a full step, in steps of compiled blocks."""
ABOVE_FLOPS = 0.03
"""How far the ratio of step times may lie above the share of FLOPs."""
OF_LORA = 0.75
"""Most time of a step at a budget of 0.5, in steps of the faster LoRA."""
Measured = dict[str, Any]


def units(setting: Setting) -> tuple[str, ...]:
    """Every workload."""
    return setting.workloads


def measure(setting: Setting, name: str, deadline: float) -> Iterator[Measured]:
    """Measure one workload; yields everything so far after each way has compiled, and after each round.

    Args:
        setting: of the run.
        name: of the workload.
        deadline: by `time.monotonic()`; at least the fewest rounds are measured.
    """
    workload, subject = setting.workload(name), setting.subject(name)
    refused = {way: reason for way in ways_of(name) if (reason := refusal(way, workload.device))}
    candidates = {way: MAKERS[way](subject) for way in ways_of(name) if way not in refused}
    steady = SteadyState(candidates, setting.selections(name), full_only=FULL_ONLY)
    plan = setting.plan(name)
    found: Measured = {"tokens": workload.rows * workload.length, "full_flops": plan["full_flops"]}
    found["trials"], trials = [_row(way, 1.0, failure=reason) for way, reason in refused.items()], []
    for trial in steady.trials:
        row = _prepare(steady, trial, plan["full_flops"], workload.device)
        found["trials"].append(row)
        if not row["failure"]:
            trials.append((trial, row))
        yield found
    fewest, most = ROUNDS
    for done in range(most):
        started = time.monotonic()
        for trial, row in trials[:: -1 if done % 2 else 1]:
            steady.prepare(trial.budget, trial.candidate)
            host, total = queue_steps(steady.candidates[trial.candidate].step, workload.device)
            row["host_s"].append(host)
            row["step_s"].append(total)
        yield found
        if done + 1 >= fewest and 2 * time.monotonic() - started > deadline:
            break


def _prepare(steady: SteadyState, trial: Trial, full_flops: int, device: torch.device) -> Measured:
    """Compile what a trial needs, and measure the FLOPs and the peak of one step."""
    candidate = steady.candidates[trial.candidate]
    row = _row(trial.candidate, trial.budget, failure="")
    chosen = steady.selections.get(trial.budget)
    row["predicted_flops"] = full_flops if chosen is None else chosen.step_flops
    try:
        steady.prepare(trial.budget, trial.candidate)
        candidate.forget_moments()  # and with them a recorded step, in which nothing is counted
        with count_flops() as counter:
            candidate.step()
        candidate.forget_moments()
        row |= {"counted_flops": counter.get_total_flops(), "peak_bytes": peak_bytes(candidate.step, device)}
    except torch.OutOfMemoryError:
        candidate.model.zero_grad()
        row["failure"] = "out of memory"
    except GTCompileError as error:  # a step that cannot be recorded
        row["failure"] = str(error)
    release_memory(device)
    return row


def _row(candidate: str, budget: float, *, failure: str) -> Measured:
    """What is known of a trial before it is measured."""
    row: Measured = {"candidate": candidate, "budget": budget, "failure": failure}
    row |= dict.fromkeys(("peak_bytes", "counted_flops", "predicted_flops"))
    return row | {"host_s": [], "step_s": []}


def queue_steps(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one of several steps in a row: until the host has queued them, and until all is done.

    Where the host is far ahead, the queue of the device is full and the host waits for it; then the first
    number says no more than that the host is not what limits the step.
    """
    wait_for(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    queued = time.perf_counter()
    wait_for(device)
    return (queued - start) / STEPS, (time.perf_counter() - start) / STEPS


def find(measured: Measured, candidate: str, budget: float) -> Measured | None:
    """One trial of a workload that has been timed, or None."""
    rows = (r for r in measured["trials"] if r["candidate"] == candidate and r["budget"] == budget)
    return next((row for row in rows if row["step_s"]), None)


def ratio(one: Measured | None, other: Measured | None) -> Spread | None:
    """Round by round, how many times as long a step of one trial takes; None if one was not timed."""
    if one is None or other is None:
        return None
    rounds = min(len(one["step_s"]), len(other["step_s"]))
    return ratios(one["step_s"][:rounds], other["step_s"][:rounds])


def faster_lora(measured: Measured) -> Measured | None:
    """The faster of the two ways to train with LoRA."""
    found = [row for way in (LORA, LORA_COMPILED) if (row := find(measured, way, 1.0))]
    return min(found, key=lambda row: spread(row["step_s"]).median, default=None)


def sheet(saved: Saved) -> Sheet:
    """One row per workload, way and budget."""
    results = saved.results
    columns = ("workload", "trained by", "budget", "FLOPs", "ms", "to own full step", "to eager, same set")
    rows = [_cells(name, measured, row) for name, measured in results.items() for row in measured["trials"]]
    verdicts = [line for name, measured in results.items() for line in _verdicts(name, measured)]
    return Sheet(
        title="Steps: forward, backward and fused AdamW",
        columns=(*columns, "host ms", "tokens/s", "peak GB"),
        rows=rows,
        verdicts=verdicts,
    )


def _cells(name: str, measured: Measured, row: Measured) -> Sequence[str]:
    way, budget = row["candidate"], row["budget"]
    if not row["step_s"]:
        return (name, way, f"{budget:g}", "", row["failure"] or "not timed", "", "", "", "", "")
    times = spread(row["step_s"])
    return (
        name,
        way,
        f"{budget:g}",
        f"{row['counted_flops'] / measured['full_flops']:.3f}",
        f"{times / 1e-3}",
        str(ratio(row, find(measured, way, 1.0))),
        str(ratio(row, find(measured, EAGER, budget)) or ""),
        f"{spread(row['host_s']).median * 1e3:.1f}",
        f"{measured['tokens'] / times.median:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
    )


def _verdicts(name: str, measured: Measured) -> Iterator[str]:
    if name.startswith(BELOW_ONE_BILLION):
        return
    full = find(measured, OURS, 1.0)
    for row in measured["trials"]:
        if row["candidate"] == OURS and row["counted_flops"] not in (None, row["predicted_flops"]):
            yield f"{name}, budget {row['budget']:g}: FLOPs are NOT those predicted"
    if over := ratio(full, find(measured, PLAIN, 1.0)):
        yield against(f"{name}: full step over compiled blocks", over, FULL_STEP)
    for row in (r for r in measured["trials"] if r["candidate"] == OURS and r["step_s"]):
        budget, share = row["budget"], row["counted_flops"] / measured["full_flops"]
        if budget != 1.0 and (over := ratio(row, full)):
            yield against(f"{name}, budget {budget:g}: step over full step", over, share + ABOVE_FLOPS)
        if budget == 0.5 and (over := ratio(row, faster_lora(measured))):
            yield against(f"{name}, budget {budget:g}: step over LoRA's", over, OF_LORA)
        if (other := find(measured, EAGER, budget)) is not None:
            peak = row["peak_bytes"] / other["peak_bytes"]
            yield against(f"{name}, budget {budget:g}: peak over eager's", Spread(peak, peak, peak), 1.0)
