"""The summary of a run: its costs and scores, compared with full fine-tuning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from gtcompile.tools.common.energy import ESTIMATED, JOULES_PER_WATT_HOUR, MEASURED, carbon_grams
from gtcompile.tools.common.terminal import say
from gtcompile.tools.finetune.step_comparison import StepComparison
from gtcompile.tools.runs.preparation import Prepared
from gtcompile.tools.runs.settings import CompilerOrAuto

IN_TURN = "seconds of a step, in turn"
"""Name of the figure that compares with plain PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One finished run."""

    title: str
    """Policy and budget."""
    model: str
    """The model's name on the command line."""
    tokenizer: str
    """Origin of the tokenizer."""
    data: str
    """Dataset, splits and number of examples."""
    batch: str
    """The shape of every batch, or of the largest."""
    real_tokens: float
    """Share of the batches' input positions that is not padding."""
    compiler: CompilerOrAuto
    """The compiler of the graphs."""
    device: str
    """The device."""
    steps: int
    """Training steps taken."""
    predicted_flops: int
    """FLOPs of all training steps, predicted from the graph."""
    counted_flops: int
    """FLOPs of all training steps: one counted step of every selection and shape, times its steps."""
    full_flops: int
    """FLOPs of full fine-tuning on the same batches, without adapters."""
    step_seconds: float
    """Median seconds of forward and backward."""
    training_seconds: float
    """Seconds of all training steps, including compilation."""
    selecting_seconds: float
    """Seconds of all selections: capturing, measuring, solving and counting."""
    compiling_seconds: float = 0.0
    """Seconds that forward and backward took beyond their median in the first step of each selection."""
    quality: Mapping[str, float]
    """Scores in percent by metric."""
    quality_before: Mapping[str, float] | None = None
    """Scores before training, if they were measured."""
    comparison: StepComparison | None = None
    """Measured after training; None for a full run."""
    note: str = ""
    """A remark on the data."""
    cached: int | None = None
    """Forwards that started from the prefix cache, of all processes; None without one."""
    joules: float | None = None
    """Energy of training steps and selections, of all processes; None if nobody knows it."""
    energy_source: str = ""
    """How the energy is known: measured or estimated."""
    grid_intensity: float | None = None
    """Grams of CO2 equivalent per kilowatt hour, as the user gave them."""
    processes: int = 1
    """Processes that trained together; FLOPs are summed over them."""
    lora: int | None = None
    """Rank of the adapters, if adapters were trained."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarise(
    prepared: Prepared,
    steps: Sequence[Mapping[str, Any]],
    selections: Sequence[Mapping[str, Any]],
    **scores: Any,
) -> Summary:
    """The summary of a run that has ended.

    Args:
        prepared: model and examples.
        steps: as in `metrics.jsonl`.
        selections: as in `selections.json`.
        **scores: the fields `quality`, `quality_before` and `comparison`.
    """
    settings, usual = prepared.settings, median(step["passes"] for step in steps)
    first = {selection["step"] + 1 for selection in selections}
    flops = ("predicted_flops", "flops"), ("counted_flops", "counted_flops"), ("full_flops", "full_flops")
    return Summary(
        title=settings.title,
        model=settings.model,
        tokenizer=prepared.language.tokenizer_origin,
        data=str(prepared.task),
        batch=prepared.collate.shape,
        real_tokens=_real_tokens(prepared, steps),
        compiler=settings.compiler,
        device=str(prepared.device),
        steps=len(steps),
        step_seconds=usual,
        compiling_seconds=sum(max(step["passes"] - usual, 0.0) for step in steps if step["step"] in first),
        training_seconds=sum(step["seconds"] for step in steps),
        selecting_seconds=sum(selection["seconds"] for selection in selections),
        note=prepared.task.format.note,
        processes=settings.processes,
        lora=settings.lora,
        grid_intensity=settings.grid_intensity,
        **_energy(settings.watts, steps, selections),
        cached=sum(step["cached"] for step in steps) if settings.prefix_cache else None,
        **{total: sum(step[name] for step in steps) for total, name in flops},
        **scores,
    )


def _real_tokens(prepared: Prepared, steps: Sequence[Mapping[str, Any]]) -> float:
    """Share of input positions that is not padding: of the steps taken, if batches differ in shape."""
    if not prepared.settings.grouped:
        return prepared.real_tokens
    return float(sum(step["tokens"] for step in steps) / sum(step["positions"] for step in steps))


def _energy(
    watts: float | None, steps: Sequence[Mapping[str, Any]], selections: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The energy of a run, and how it is known: counted in every step, or estimated from watts."""
    if all("joules" in step for step in steps):
        return {"joules": math.fsum(step["joules"] for step in steps), "energy_source": MEASURED}
    if watts is None:
        return {}
    seconds = math.fsum(part["seconds"] for part in (*steps, *selections))
    return {"joules": watts * seconds, "energy_source": ESTIMATED}


def summary_from(values: Mapping[str, Any]) -> Summary:
    """The summary that `as_dict` was called on."""
    steps = values["comparison"]
    return Summary(**{**values, "comparison": steps and StepComparison(**steps)})


def comparison(run: Summary, full: Summary | None = None) -> Table:
    """A table of a run and of full fine-tuning.

    Args:
        run: the run.
        full: a full run on the same data; without it, the column holds what the run knows about one.
    """
    table = Table(title=f"{run.model} on {run.data}")
    table.add_column("")
    table.add_column(run.title, justify="right")
    table.add_column("full" if full else "full, not run", justify="right")
    other = (_figures(full) if full else {}) | _known_of_full(run)
    for name, value in _figures(run).items():
        table.add_row(name, value, other.get(name, "-"))
    return table


def show(console: Console, runs: Sequence[Summary], folder: Path) -> None:
    """Print a run, or a run and a full one, with an explanation of the figures."""
    console.print(comparison(*runs))
    say(console, *notes(runs), f"Written to {folder}.")


def _figures(run: Summary) -> dict[str, str]:
    figures = {
        "FLOPs predicted": f"{run.predicted_flops:.4e}",
        "FLOPs counted": f"{run.counted_flops:.4e}",
        "share of full": f"{run.predicted_flops / run.full_flops:.1%}",
        "seconds of a step": f"{run.step_seconds:.4f}",
        IN_TURN: f"{run.comparison.plan_seconds:.4f}" if run.comparison else "-",
        "seconds of training": f"{run.training_seconds:.1f}",
        "seconds of compiling": f"{run.compiling_seconds:.1f}",
        "seconds of selecting": f"{run.selecting_seconds:.1f}",
    }
    return figures | _energy_figures(run) | {name: _score(run, name) for name in run.quality}


def _energy_figures(run: Summary) -> dict[str, str]:
    if run.joules is None:
        return {}
    figures = {f"Wh, {run.energy_source}": f"{run.joules / JOULES_PER_WATT_HOUR:.4g}"}
    if run.grid_intensity is not None:
        grams = carbon_grams(run.joules, run.grid_intensity)
        figures[f"g CO2e at {run.grid_intensity:g} g/kWh"] = f"{grams:.4g}"
    return figures


def _score(run: Summary, name: str) -> str:
    before = "" if run.quality_before is None else f" (from {run.quality_before[name]:.1f})"
    return f"{run.quality[name]:.1f}{before}"


def _known_of_full(run: Summary) -> dict[str, str]:
    known = {"FLOPs predicted": f"{run.full_flops:.4e}", "share of full": "100.0%"}
    if run.comparison is not None:
        known[IN_TURN] = f"{run.comparison.full_seconds:.4f}"
    return known


def _devices(run: Summary) -> str:
    return run.device if run.processes == 1 else f"{run.device} of each of {run.processes} processes"


def _agreement(run: Summary) -> str:
    recomputed = run.counted_flops / run.predicted_flops - 1
    return f"{recomputed:.1%} more, recomputed to save memory" if recomputed else "both agree"


def _adapters(run: Summary) -> str:
    if run.lora is None:
        return ""
    return (
        f"Only adapters of rank {run.lora} were trained. Full means full fine-tuning: steps that train all "
        f"weights of the base model, without adapters."
    )


def _savings(run: Summary) -> str:
    if run.cached is None:
        return ""
    return (
        f"{run.cached} forwards started from the prefix cache; the FLOPs are those of the steps as they ran, "
        f"and the steps in turn used no cache."
    )


def _gain(run: Summary) -> str:
    """After how many steps the run's overhead is won back, compared with plain PyTorch."""
    if run.comparison is None:
        return ""
    own, plain = run.comparison.plan_seconds, run.comparison.full_seconds
    if own >= plain:
        return (
            f"It does not pay on this model: a step takes {own / plain:.2f} of a full step of plain PyTorch"
            f"{'' if run.lora is None else ', without adapters'}."
        )
    overhead = run.selecting_seconds + run.compiling_seconds
    steps = math.ceil(overhead / (plain - own))
    text = f"The {overhead:.1f} s of selecting and compiling are won back after {steps} steps"
    return f"{text}, of which this run took {run.steps}."


def notes(runs: Sequence[Summary]) -> list[str]:
    """An explanation of the figures, one sentence per line."""
    run = runs[0]
    lines = [
        f"Batches of {run.batch}, {run.real_tokens:.0%} of the input tokens are not padding; "
        f"{run.steps} steps; {run.compiler} compiler on {_devices(run)}.",
        "FLOPs are of forward and backward on these batches, 2 per multiply-add; predicted from the graph, "
        "and counted by running one step of each selection, and of each length of batches, operator by "
        "operator: "
        f"{_agreement(run)}.",
        "Seconds of a step are the median of forward and backward. In turn: steps of the last selection and "
        "full steps of plain eager PyTorch, taken alternately after training, so that other work on the "
        "machine slows both alike. Seconds of training are all steps including optimizer and compilation; "
        "compiling is what the first step of a selection took beyond the median.",
        _adapters(run),
        _savings(run),
        _gain(run),
        run.note,
    ]
    return [line for line in lines if line]
