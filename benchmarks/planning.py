"""Time and memory to plan for the paper's largest models: capture, costs and selection without weights.

python -m benchmarks.planning
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from benchmarks.measurement import in_fresh_process, verdict
from benchmarks.paper.models import PAPER_MODELS, build_on_meta, make_batch
from gtcompile import BackwardCosts, select_parameters
from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.tools.bench.measurement import describe_machine
from gtcompile.tools.common.known_importances import draw_importance

BUDGETS = (0.36, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a full step's FLOPs to select for."""
SECONDS = {"OPT-2.7B": 15.0, "FLAN-T5-XL": 60.0}
"""Seconds that planning may take, by model."""
GIGABYTES = {"OPT-2.7B": 3.0}
"""Peak memory that planning may reach, in GB by model."""
SELECTION_SECONDS = 1.0
"""Seconds that one selection may take."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSelection:
    """One selection, timed."""

    budget: float
    """Share of a full step's FLOPs that may be spent."""
    spent: float
    """Share of a full step's FLOPs that the selection takes."""
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Processor time, which a busy machine changes less."""
    gap: float
    """Largest possible distance to the best selection; 0.0 when proven the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """Time and memory to plan for one model in its own process."""

    model: str
    """Name in `PAPER_MODELS`."""
    nodes: int
    """Nodes of the joint graph."""
    parameters: int
    """Parameters that can be selected."""
    stages: tuple[tuple[str, float], ...]
    """Name and wall seconds of each stage before selection."""
    selections: tuple[TimedSelection, ...]
    """One per budget."""
    cpu_seconds: float
    """Processor time of all stages and all selections."""
    peak_gigabytes: float
    """Most memory the process ever had resident, libraries included."""

    @property
    def seconds(self) -> float:
        """Wall time of all stages and the slowest selection."""
        return sum(s for _, s in self.stages) + max(s.seconds for s in self.selections)


def measure_planning(
    name: str, config: PretrainedConfig, shape: tuple[int, int, int], budgets: Sequence[float]
) -> Planning:
    """Plan for one model on the meta device, every stage timed.

    Args:
        name: for the report.
        config: of the model.
        shape: rows, tokens, and target tokens of an encoder-decoder, of the batch.
        budgets: shares of a full step's FLOPs, in (0, 1].
    """
    cpu = time.process_time()
    model, build_s = _timed(lambda: build_on_meta(config))
    joint, capture_s = _timed(lambda: capture(model, make_batch(config, *shape)))
    costs, costs_s = _timed(lambda: costs_of(joint))
    selections = tuple(_timed_selection(costs, budget) for budget in budgets)
    return Planning(
        model=name,
        nodes=len(joint.module.graph.nodes),
        parameters=len(costs.fqns),
        stages=(("build", build_s), ("capture", capture_s), ("costs", costs_s)),
        selections=selections,
        cpu_seconds=time.process_time() - cpu,
        peak_gigabytes=peak_gigabytes(),
    )


def measure_paper_model(name: str) -> Planning:
    """Plan for a model of the paper at its batches of 4 x 512 tokens, 64 for an encoder-decoder's targets."""
    return measure_planning(name, PAPER_MODELS[name](), (4, 512, 64), BUDGETS)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _timed_selection(costs: BackwardCosts, budget: float) -> TimedSelection:
    importance = draw_importance(costs, seed=0)
    cpu = time.process_time()
    selection, seconds = _timed(lambda: select_parameters(costs, importance, budget))
    return TimedSelection(
        budget=budget,
        spent=selection.step_fraction,
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu,
        gap=selection.gap,
    )


def peak_gigabytes() -> float:
    """Most memory this process ever had resident, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, without what the parent had when it forked
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # in bytes on macOS


def stage_table(plannings: Sequence[Planning]) -> Table:
    """One row per model: seconds of each stage, and memory."""
    table = Table(title="Planning from a configuration: seconds by stage, memory at its peak")
    table.add_column("model", no_wrap=True)
    for column in ("nodes", "params", "build", "capture", "costs", "select", "in all", "CPU", "GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for planning in plannings:
        slowest = max(s.seconds for s in planning.selections)
        times = (*(s for _, s in planning.stages), slowest, planning.seconds, planning.cpu_seconds)
        counts = (str(planning.nodes), str(planning.parameters))
        cells = (*counts, *(f"{s:.2f}" for s in times), f"{planning.peak_gigabytes:.2f}")
        table.add_row(planning.model, *cells)
    return table


def selection_table(plannings: Sequence[Planning]) -> Table:
    """One row per model and budget."""
    table = Table(title="Selection with random importances (log-normal, seed 0)")
    table.add_column("model")
    for column in ("budget", "spent", "seconds", "CPU", "gap"):
        table.add_column(column, justify="right")
    for planning in plannings:
        for s in planning.selections:
            numbers = (
                f"{s.budget:.2f}",
                f"{s.spent:.6f}",
                f"{s.seconds:.2f}",
                f"{s.cpu_seconds:.2f}",
                f"{s.gap:.2g}",
            )
            table.add_row(planning.model, *numbers)
    return table


def verdicts(planning: Planning) -> list[str]:
    """One line per target."""
    name, slowest = planning.model, max(s.seconds for s in planning.selections)
    lines = []
    if name in SECONDS:
        lines.append(f"{planning.seconds:.1f} s in all: {verdict(planning.seconds, SECONDS[name])}")
    if name in GIGABYTES:
        peak = planning.peak_gigabytes
        lines.append(f"{peak:.2f} GB at the peak: {verdict(peak, GIGABYTES[name])}")
    lines.append(f"slowest selection {slowest:.2f} s: {verdict(slowest, SELECTION_SECONDS)}")
    lines.append(f"greatest gap: {verdict(max(s.gap for s in planning.selections), 0.0)}")
    return [f"{name}: {line}" for line in lines]


def main(
    models: Annotated[list[str] | None, typer.Argument(help="of the paper's; default: the two timed")] = None,
) -> None:
    """Time capture, costs and selection for models of the paper, each in a fresh process."""
    names = models or list(SECONDS)
    if unknown := [name for name in names if name not in PAPER_MODELS]:
        raise typer.BadParameter(f"no model is called {unknown[0]}; known are {', '.join(PAPER_MODELS)}")
    plannings = [in_fresh_process(measure_paper_model, name) for name in names]
    console = Console()
    console.print(describe_machine(torch.device("cpu")), highlight=False)
    console.print(stage_table(plannings), selection_table(plannings))
    for planning in plannings:
        console.print(*verdicts(planning), sep="\n", highlight=False)


if __name__ == "__main__":
    typer.run(main)
