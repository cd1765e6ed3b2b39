"""The cost of changing the trained set, and of a step afterwards, for gtcompile and every baseline.

Run it with `python -m benchmarks.switching`; `--workload opt-2.7b --device cuda` is for a GPU.
On a CPU it quotes ratios only.
"""

import functools
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.dispatch_overhead import Dispatch, measure_dispatch
from benchmarks.measurement import in_fresh_process, keep_memory, release_memory, verdict
from benchmarks.paper.models import build_on_meta
from benchmarks.steady_state import (
    measure_memory,
    memory_table,
    memory_verdicts,
    predicted_saved,
    set_up,
    time_duels,
    time_table,
    time_verdicts,
)
from benchmarks.workloads import (
    UNLIMITED,
    WORKLOADS,
    Workload,
    hoisted_blocks,
    random_sets,
    whole,
    whole_with_reset,
)
from gtcompile.tools.bench.baselines import (
    Candidate,
    Compilations,
    Trained,
    compilations,
    eager,
    plain_blocks,
)
from gtcompile.tools.bench.measurement import describe_machine, seconds, spread
from gtcompile.tools.bench.steady_state import time_steps

BUDGETS = (0.4, 0.5, 0.7)
"""Shares of a full step's FLOPs."""
DEPTHS = (4, 8, 16, 32)
"""Blocks per model whose compilation is timed."""
ORDINARY_STEPS = 3
"""Steps after the first with each set; their median is the ordinary step."""
LIMIT_TRIES = 10
"""Sets for the baseline that reaches Dynamo's default limit of 8 captures."""
MEDIAN_SWITCH, WORST_SWITCH = 1.2, 2.0
"""Ordinary steps that the first step with a new set may take."""
DISPATCH_MICROSECONDS = 30.0
"""Microseconds that dispatching one call of a region may take."""
FLAT = 1.25
"""Most compile time of any model, in compile times of the shallowest one."""
OURS = "gtcompile, hoisted blocks"
EAGER = "eager, requires_grad_"
TWICE = (OURS, EAGER)
"""Candidates that compile nothing; they go through the sets twice."""
Part = Literal["switching", "steady", "memory", "dispatch", "depth"]
PARTS: tuple[Part, ...] = ("switching", "steady", "memory", "dispatch", "depth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Switching:
    """First steps with new trained sets, one after the other, of one candidate."""

    candidate: str
    first_steps: tuple[float, ...]
    """In ordinary steps with the same set; one per set after the first."""
    again: tuple[float, ...] = ()
    """A second pass over the same sets with a fresh candidate; empty without a second pass."""
    ordinary_s: float
    """Median seconds of an ordinary step."""
    done: Compilations
    """Compilations after the first set, in all passes."""

    @property
    def worst_in_both(self) -> float:
        """The slowest set in both passes: other work on the machine seldom slows the same set twice."""
        return max(map(min, self.first_steps, self.again or self.first_steps))


def measure_switching(
    name: str, candidate: Candidate, sets: Sequence[Trained], device: torch.device
) -> Switching:
    """Train with each set in turn.

    Args:
        name: of the candidate.
        candidate: a fresh one.
        sets: the first is not timed, since it compiles.
        device: where it runs.
    """
    candidate.switch_and_step(sets[0])
    candidate.step()
    before, first_steps, ordinary = compilations(), [], []
    for trained in sets[1:]:
        first = seconds(functools.partial(candidate.switch_and_step, trained), device)
        ordinary.append(statistics.median(seconds(candidate.step, device) for _ in range(ORDINARY_STEPS)))
        first_steps.append(first / ordinary[-1])
    return Switching(
        candidate=name,
        first_steps=tuple(first_steps),
        ordinary_s=statistics.median(ordinary),
        done=compilations() - before,
    )


def switching_candidates(count: int, slow: int) -> dict[str, tuple[Callable[[Workload], Candidate], int]]:
    """How to make each candidate, and how many new sets it gets; those that compile get few."""
    return {
        OURS: (hoisted_blocks, count),
        EAGER: (eager, count),
        "torch.compile, default limit": (whole, max(slow, min(count, LIMIT_TRIES))),
        "torch.compile, limit raised": (functools.partial(whole, recompile_limit=UNLIMITED), slow),
        "torch.compile, reset each time": (whole_with_reset, slow),
        "plain blocks, default limit": (plain_blocks, slow),
        "plain blocks, limit raised": (functools.partial(plain_blocks, recompile_limit=UNLIMITED), slow),
    }


def compare_switching(workload: Workload, count: int, slow: int, seed: int) -> list[Switching]:
    """Switch every candidate from everything trained through the same random sets, one candidate at a time.

    Args:
        workload: what to train.
        count: new sets for the candidates that compile nothing.
        slow: new sets for those that compile.
        seed: of the sets.
    """
    names = [name for name, _ in build_on_meta(workload.config()).named_parameters()]
    sets = [frozenset(names), *random_sets(names, max(count, slow), seed)]  # at first all have moments
    keep_memory()
    results = []
    for name, (make, tries) in switching_candidates(count, slow).items():
        torch.compiler.reset()
        gc.collect()
        result = measure_switching(name, make(workload), sets[: tries + 1], workload.device)
        if name in TWICE:
            torch.compiler.reset()
            gc.collect()
            result = twice(result, measure_switching(name, make(workload), sets, workload.device))
        results.append(result)
    return results


def twice(one: Switching, other: Switching) -> Switching:
    """Two passes of one candidate over the same sets as one result."""
    captures = one.done.captures + other.done.captures
    done = Compilations(captures, one.done.compiled + other.done.compiled)
    return replace(one, again=other.first_steps, done=done)


def switching_table(results: Sequence[Switching], device: torch.device) -> Table:
    """One row per candidate; "twice" is the slowest set in both of two passes."""
    table = Table(title="First step with a new trained set, in ordinary steps with that set")
    table.add_column("candidate")
    timed = device.type == "cuda"
    for column in (
        "sets",
        "median",
        "worst",
        "twice",
        "captures",
        "compiled",
        *(("ms a step",) if timed else ()),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        first = spread(result.first_steps)
        counts = (str(result.done.captures), str(result.done.compiled))
        milliseconds = (f"{result.ordinary_s * 1e3:.1f}",) if timed else ()
        both = f"{result.worst_in_both:.2f}" if result.again else "-"
        cells = (f"{first.median:.2f}", f"{first.high:.2f}", both, *counts, *milliseconds)
        table.add_row(result.candidate, str(len(result.first_steps)), *cells)
    return table


def switching_verdicts(results: Sequence[Switching]) -> list[str]:
    """One line per target."""
    ours = next(result for result in results if result.candidate == OURS)
    first, compiled = spread(ours.first_steps), ours.done.captures + ours.done.compiled
    return [
        f"first step with a new set, median {first.median:.2f}: {verdict(first.median, MEDIAN_SWITCH)}",
        f"first step with a new set, worst {first.high:.2f}: {verdict(first.high, WORST_SWITCH)}",
        f"slowest set in both of two passes, {ours.worst_in_both:.2f}: "
        f"{verdict(ours.worst_in_both, WORST_SWITCH)}",
        f"captures and compilations after the first set, {compiled}: {verdict(compiled, 0)}",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Compiling a model's blocks."""

    depth: int
    """Blocks."""
    seconds: float
    """Difference between the first step and a later one."""
    done: Compilations


def time_compilation(make: Callable[[Workload], Candidate], workload: Workload) -> Compiled:
    """Time the first step of a fresh candidate against later ones."""
    candidate, before = make(workload), compilations()
    first = seconds(candidate.step, workload.device)
    done = compilations() - before
    later = statistics.median(seconds(candidate.step, workload.device) for _ in range(ORDINARY_STEPS))
    return Compiled(depth=workload.layers, seconds=first - later, done=done)


def measure_compilation(workload: Workload) -> Compiled:
    """Time the first step of a model with hoisted blocks, with no cache on disk."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return time_compilation(hoisted_blocks, workload)


def compare_depths(workload: Workload, depths: Sequence[int]) -> list[Compiled]:
    """Time the compilation of models of several depths, each in a fresh process."""
    return [in_fresh_process(measure_compilation, replace(workload, layers=depth)) for depth in depths]


def depth_table(results: Sequence[Compiled], device: torch.device) -> Table:
    """One row per depth."""
    table = Table(title="Compiling a model with hoisted blocks, no cache on disk")
    timed = device.type == "cuda"
    for column in ("blocks", "time to shallowest", "captures", "compiled", *(("s",) if timed else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        counts = (str(result.done.captures), str(result.done.compiled))
        ratio = f"{result.seconds / results[0].seconds:.2f}"
        table.add_row(str(result.depth), ratio, *counts, *((f"{result.seconds:.1f}",) if timed else ()))
    return table


def depth_verdicts(results: Sequence[Compiled]) -> list[str]:
    """One line per target."""
    worst = max(result.seconds for result in results) / results[0].seconds
    more = max(result.done.compiled for result in results) - results[0].done.compiled
    return [
        f"additional compilations of a deeper model, {more}: {verdict(more, 0)}",
        f"longest compilation over the shallowest model's {worst:.2f}: {verdict(worst, FLAT)}",
    ]


def dispatch_table(dispatch: Dispatch) -> Table:
    """Forward and backward of one call."""
    table = Table(title="One call of a tiny block, everything trained: the fastest of many, microseconds")
    for column in ("", "plain compiled block", "hoisted region", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    plain, hoisted = dispatch.plain, dispatch.hoisted
    forward = (plain.forward_us, hoisted.forward_us, dispatch.forward_us)
    backward = (plain.backward_us, hoisted.backward_us, dispatch.backward_us)
    table.add_row("forward", *(f"{us:.1f}" for us in forward))
    table.add_row("backward with its weight gradients", *(f"{us:.1f}" for us in backward))
    return table


def dispatch_verdicts(dispatch: Dispatch) -> list[str]:
    """One line."""
    us = dispatch.forward_us
    return [f"dispatching a region call, {us:.1f} microseconds: {verdict(us, DISPATCH_MICROSECONDS)}"]


def make_workload(
    name: str, device: torch.device, dtype: torch.dtype | None, **sizes: int | None
) -> Workload:
    """A workload by name, some of its sizes replaced.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in WORKLOADS:
        raise ValueError(f"no workload is called {name!r}; known are {', '.join(WORKLOADS)}")
    given = {size: value for size, value in sizes.items() if value is not None}
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Workload(**{**WORKLOADS[name], **given, "device": device, "dtype": dtype})


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure."""

    sets: int
    """New trained sets for the candidates that compile nothing."""
    slow_sets: int
    """New trained sets for the candidates that compile."""
    rounds: int
    """Rounds of the steady state: each trial takes one turn in a round, each duel several."""
    seed: int
    """Seed of trained sets and importances."""
    depths: Sequence[int] = DEPTHS
    budgets: Sequence[float] = BUDGETS


def run_part(part: Part, workload: Workload, effort: Effort) -> tuple[Table, list[str]]:
    """Measure one part: its table, and a line per target."""
    device = workload.device
    if part == "switching":
        switching = compare_switching(workload, effort.sets, effort.slow_sets, effort.seed)
        return switching_table(switching, device), switching_verdicts(switching)
    if part == "dispatch":
        dispatch = measure_dispatch(workload)
        return dispatch_table(dispatch), dispatch_verdicts(dispatch)
    if part == "depth":
        depths = compare_depths(workload, effort.depths)
        return depth_table(depths, device), depth_verdicts(depths)
    steady = set_up(workload, effort.budgets, effort.seed)
    if part == "memory":
        memory = measure_memory(steady, device)
        return memory_table(predicted_saved(workload, steady), memory), memory_verdicts(memory)
    times, compared = time_steps(steady, effort.rounds, device), time_duels(steady, effort.rounds, device)
    return time_table(steady, times, compared, device), time_verdicts(steady, times, compared)


DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(
    workload: Annotated[str, typer.Option(help=f"one of {', '.join(WORKLOADS)}")] = "opt",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, or bfloat16 (default on cuda)")] = None,
    layers: Annotated[int | None, typer.Option(min=2)] = None,
    hidden: Annotated[int | None, typer.Option(min=64, help="a multiple of 64")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=2)] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="sequences per batch")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens per sequence")] = None,
    sets: Annotated[int, typer.Option(min=1, help="new sets for candidates that compile nothing")] = 50,
    slow_sets: Annotated[int, typer.Option(min=1, help="new sets for candidates that compile")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="of the steady state")] = 7,
    seed: Annotated[int, typer.Option(help="of trained sets and importances")] = 0,
    only: Annotated[list[str] | None, typer.Option(help=f"parts to run, of {', '.join(PARTS)}")] = None,
) -> None:
    """Measure switching, steady state, memory, dispatch, and compilation against depth."""
    sizes = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "rows": rows, "length": length}
    parts = tuple(part for part in PARTS if not only or part in only)
    if unknown := [name for name in only or [] if name not in PARTS]:
        raise typer.BadParameter(f"no part is called {unknown[0]}; known are {', '.join(PARTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    try:
        chosen = make_workload(workload, torch.device(device), DTYPES[dtype] if dtype else None, **sizes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    effort = Effort(sets=sets, slow_sets=slow_sets, rounds=rounds, seed=seed)
    console = Console()
    console.print(describe_machine(chosen.device), str(chosen), sep="\n", highlight=False)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # earlier runs must not help
        for part in parts:
            release_memory(chosen.device)  # a part may start processes that need the memory of the one before
            table, lines = run_part(part, chosen, effort)
            console.print(table)
            console.print(*lines, sep="\n", highlight=False)


if __name__ == "__main__":
    typer.run(main)
