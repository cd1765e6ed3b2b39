"""What a run cost and what came of it, beside full fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gtcompile.tools.common.terminal import say


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """Steps of the run's last plan and full steps, taken in turn on one batch without updating anything."""

    full_flops: int
    """Of a full step: predicted, and equal to what was counted."""
    full_seconds: float
    """Forward and backward of a full step, the median of a few."""
    plan_seconds: float
    """The same with the last plan."""
    full_saved_bytes: int | None = None
    """What a full step keeps from the forward for the backward, measured; None in older summaries."""
    full_peak_bytes: int | None = None
    """Most bytes a full step's forward and backward allocate at once; None as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One finished run."""

    title: str
    """Method and budget."""
    model: str
    """As asked for."""
    tokenizer: str
    """Where the tokenizer comes from."""
    data: str
    """Dataset, splits and number of examples."""
    batch: str
    """The shape of every batch, for which FLOPs are quoted."""
    real_tokens: float
    """Share of a batch's input positions that is not padding."""
    compiler: str
    """Who compiled the graphs."""
    device: str
    """Where it ran."""
    steps: int
    """Training steps taken."""
    predicted_flops: int
    """Of all training steps, from the graph."""
    counted_flops: int
    """Of all training steps: one step counted operator by operator per selection, times its steps."""
    full_flops: int
    """What as many full steps take."""
    step_seconds: float
    """Forward and backward of one step, median."""
    training_seconds: float
    """All training steps, compilation included."""
    selecting_seconds: float
    """Capturing, measuring, solving and counting."""
    quality: Mapping[str, float]
    """Metric to score in percent."""
    quality_before: Mapping[str, float] | None = None
    """The same before training, where it was measured."""
    comparison: StepComparison | None = None
    """Measured after training; None for a full run."""
    note: str = ""
    """What a reader must know of the data."""
    processes: int = 1
    """Processes that trained together; FLOPs are those of all of them."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summary_from(values: Mapping[str, Any]) -> Summary:
    """The summary that `as_dict` was called on."""
    steps = values["comparison"]
    return Summary(**{**values, "comparison": steps and StepComparison(**steps)})


def comparison(run: Summary, full: Summary | None = None) -> Table:
    """A run beside full fine-tuning.

    Args:
        run: the run.
        full: a full run on the same data; without it the column holds what is known of one.
    """
    table = Table(title=f"{run.model} on {run.data}")
    table.add_column("")
    table.add_column(run.title, justify="right")
    table.add_column("full" if full else "full, not run", justify="right")
    other = _known_of_full(run) | (_figures(full) if full else {})
    if full is not None and run.comparison is not None:
        other["seconds of a step, in turn"] = f"{run.comparison.full_seconds:.4f}"
    for name, value in _figures(run).items():
        table.add_row(name, value, other.get(name, "-"))
    return table


def show(console: Console, runs: Sequence[Summary], folder: Path) -> None:
    """Print a run, or a run and a full one, with what the figures stand for."""
    console.print(comparison(*runs))
    say(console, *notes(runs), f"Written to {folder}.")


def _figures(run: Summary) -> dict[str, str]:
    figures = {
        "FLOPs predicted": f"{run.predicted_flops:.4e}",
        "FLOPs counted": f"{run.counted_flops:.4e}",
        "share of full": f"{run.predicted_flops / run.full_flops:.1%}",
        "seconds of a step": f"{run.step_seconds:.4f}",
        "seconds of a step, in turn": f"{run.comparison.plan_seconds:.4f}" if run.comparison else "-",
        "seconds of training": f"{run.training_seconds:.1f}",
        "seconds of selecting": f"{run.selecting_seconds:.1f}",
    }
    return figures | {name: _score(run, name) for name in run.quality}


def _score(run: Summary, name: str) -> str:
    before = "" if run.quality_before is None else f" (from {run.quality_before[name]:.1f})"
    return f"{run.quality[name]:.1f}{before}"


def _known_of_full(run: Summary) -> dict[str, str]:
    known = {
        "FLOPs predicted": f"{run.full_flops:.4e}",
        "share of full": "100.0%",
    }
    if run.comparison is not None:
        known["FLOPs counted"] = f"{run.comparison.full_flops * run.steps * run.processes:.4e}"
        known["seconds of a step, in turn"] = f"{run.comparison.full_seconds:.4f}"
    return known


def _devices(run: Summary) -> str:
    return run.device if run.processes == 1 else f"{run.device} of each of {run.processes} processes"


def _agreement(run: Summary) -> str:
    recomputed = run.counted_flops / run.predicted_flops - 1
    return f"{recomputed:.1%} more, computed again to save memory" if recomputed else "both agree"


def notes(runs: Sequence[Summary]) -> list[str]:
    """What the figures stand for, one sentence per line."""
    run = runs[0]
    lines = [
        f"Batches of {run.batch}, {run.real_tokens:.0%} of the input tokens are not padding; "
        f"{run.steps} steps; {run.compiler} compiler on {_devices(run)}.",
        "FLOPs are of forward and backward at this shape, 2 per multiply-add; predicted from the graph, "
        "and counted by running one step of each selection operator by operator: "
        f"{_agreement(run)}.",
        "Seconds of a step are the median of forward and backward; in turn: steps of both kinds taken "
        "alternately after training, so that what else the machine does weighs on both. Seconds of training "
        "are all steps with the optimizer and with compilation.",
        run.note,
    ]
    return [line for line in lines if line]
