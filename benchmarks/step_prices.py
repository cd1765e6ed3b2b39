"""Seconds and bytes of training steps, predicted by `gtcompile.step_prices` and measured.

Run it with `python -m benchmarks.step_prices`. On a machine with other work, `--clock process` compares
seconds of this process on one thread instead of wall seconds; the column after the errors says how far the
same step is from itself.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import keep_memory
from benchmarks.steady_state import joint_of
from benchmarks.switching import make_workload
from benchmarks.workloads import Workload, hoisted_blocks
from gtcompile import StepPrices, select_parameters
from gtcompile.costs.backward_costs import BackwardCosts, costs_of
from gtcompile.prices.saved_values import compiled_parts, saved_values
from gtcompile.prices.step_prices import memory_price
from gtcompile.prices.step_timing import Clock, measure_rates
from gtcompile.tools.bench.baselines import Candidate, Trained, eager
from gtcompile.tools.bench.measurement import describe_machine, wait_for
from gtcompile.tools.common.known_importances import draw_importance
from gtcompile.tools.common.step_memory import peak_bytes, saved_bytes

BUDGETS = (0.5, 0.7)
"""Shares of FLOPs whose best sets are tried, for two importances each."""
RANDOM_SETS = 3
"""Random sets that are tried besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One set: predicted and measured."""

    name: str
    predicted_s: float
    measured_s: Sequence[float]
    """One per round."""
    predicted_bytes: int
    measured_bytes: int
    peak_bytes: int
    """Most bytes allocated at once in the first step, beside the weights."""

    @property
    def seconds_error(self) -> float:
        """Predicted over measured seconds, less 1."""
        return self.predicted_s / statistics.median(self.measured_s) - 1

    @property
    def bytes_error(self) -> float:
        """Predicted over measured bytes, less 1."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def unsteadiness(self) -> float:
        """How far the medians of the even and of the odd rounds lie apart, as a share."""
        even, odd = (statistics.median(self.measured_s[start::2]) for start in (0, 1))
        return abs(even / odd - 1)


def trained_sets(costs: BackwardCosts, seed: int) -> dict[str, Trained]:
    """The sets to compare, none of which was timed for the prediction, except everything."""
    sets = {"everything": costs.fqns}
    for budget in BUDGETS:
        for importance in (seed, seed + 1):
            chosen = select_parameters(costs, draw_importance(costs, importance), budget)
            sets[f"best at {budget:g}, {importance}"] = chosen.trained
    rng, names = random.Random(seed), sorted(costs.fqns)
    for index in range(RANDOM_SETS):
        sets[f"random {index}"] = frozenset(rng.sample(names, rng.randint(2, len(names))))
    return sets


def measured_bytes(candidate: Candidate, trained: Trained) -> tuple[int, int]:
    """Bytes saved for backward, of gradients and of optimizer state; and the peak of the first step."""
    candidate.forget_moments()
    candidate.switch(trained)
    candidate.loss().backward()  # compiles, which is not part of a step
    candidate.optimizer.zero_grad()
    saved = saved_bytes(candidate.loss, candidate.model)
    peak = peak_bytes(candidate.step, next(candidate.model.parameters()).device)
    candidate.loss().backward()
    gradients = sum(p.grad.nbytes for p in candidate.model.parameters() if p.grad is not None)
    states = candidate.optimizer.state.values()
    moments = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    candidate.optimizer.zero_grad()
    return saved + gradients + moments, peak


def predict(candidate: Candidate, workload: Workload, clock: Clock) -> tuple[BackwardCosts, StepPrices]:
    """The costs, and the prices as `step_prices` makes them, by another clock."""
    joint = joint_of(workload)
    costs, model, optimizer = costs_of(joint), candidate.model, candidate.optimizer
    rates = measure_rates(model, optimizer, candidate.batch, costs, None, clock)
    memory = memory_price(model, optimizer, saved_values(joint, compiled_parts(model)), "keep")
    return costs, StepPrices(nanoseconds=rates.price(costs), memory=memory)


def time_in_turns(
    candidate: Candidate, sets: Mapping[str, Trained], rounds: int, device: torch.device, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of a step with each set in each round, the sets taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sets}
    order = list(sets)
    for _ in range(rounds):
        for name in order:
            candidate.switch_and_step(sets[name])
            wait_for(device)
            start = clock()
            candidate.step()
            wait_for(device)
            times[name].append(clock() - start)
        order.reverse()
    return times


def compare(candidate: Candidate, workload: Workload, rounds: int, seed: int, clock: Clock) -> list[Compared]:
    """Compare every set, the steps taking turns."""
    costs, prices = predict(candidate, workload, clock)
    sets = trained_sets(costs, seed)
    sizes = {name: measured_bytes(candidate, trained) for name, trained in sets.items()}
    times = time_in_turns(candidate, sets, rounds, workload.device, clock)
    return [
        Compared(
            name=name,
            predicted_s=prices.step_seconds(trained),
            measured_s=times[name],
            predicted_bytes=prices.step_bytes(trained),
            measured_bytes=sizes[name][0],
            peak_bytes=sizes[name][1],
        )
        for name, trained in sets.items()
    ]


def table_of(title: str, rows: Sequence[Compared]) -> Table:
    """One row per set."""
    table = Table(title=title)
    table.add_column("set", no_wrap=True)
    for column in ("seconds", "halves", "MB", "measured", "error", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds_error:+.1%}",
            f"{row.unsteadiness:.1%}",
            f"{row.predicted_bytes / 1e6:.1f}",
            f"{row.measured_bytes / 1e6:.1f}",
            f"{row.bytes_error:+.2%}",
            f"{row.peak_bytes / 1e6:.1f}",
        )
    return table


def verdicts(rows: Sequence[Compared]) -> list[str]:
    """Two lines: worst and median errors."""
    lines = []
    for what, errors in (
        ("seconds", [abs(row.seconds_error) for row in rows]),
        ("bytes", [abs(row.bytes_error) for row in rows]),
    ):
        lines.append(f"{what}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    return lines


def main(
    workload: Annotated[str, typer.Option(help="opt or llama")] = "opt",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    layers: Annotated[int | None, typer.Option(min=2)] = None,
    hidden: Annotated[int | None, typer.Option(min=64, help="a multiple of 64")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=2)] = None,
    compiled: Annotated[bool, typer.Option(help="compile the blocks")] = True,
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    seed: Annotated[int, typer.Option(help="of sets and importances")] = 0,
    clock: Annotated[Literal["wall", "process"], typer.Option(help="what tells seconds")] = "wall",
) -> None:
    """Compare predicted with measured seconds and bytes."""
    console = Console()
    sizes = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary}
    subject = make_workload(workload, torch.device(device), None, **sizes)
    keep_memory()
    console.print(f"{subject}; {describe_machine(subject.device)}")
    tell = time.process_time if clock == "process" else time.perf_counter
    candidate = (hoisted_blocks if compiled else eager)(subject)
    rows = compare(candidate, subject, rounds, seed, tell)
    console.print(table_of("Errors of predicted seconds and bytes, in shares of what was measured", rows))
    for line in verdicts(rows):
        console.print(line)


if __name__ == "__main__":
    typer.run(main)
