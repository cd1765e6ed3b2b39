"""Check the backend on many architectures: `python -m benchmarks.zoo`.

Each model is checked in its own process. Results are written after each model, and models that the file
already holds are not checked again, so an interrupted run can be continued.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.processes import Job, Result, run_jobs
from benchmarks.zoo.check import MODES, Checked, check_named
from benchmarks.zoo.models import ARCHITECTURES, read_architectures
from gtcompile.tools.common.files import write_lines

TIME_LIMIT = 600.0
"""Seconds for one model."""


def check_in_process(path: Path, name: str, family: str, mode: str) -> Checked:
    """Check a model in its own process, so that a crash or an endless loop does no harm."""
    failed = Checked(name=name, family=family, mode=mode)
    job = Job(name, _check, (path, name, mode))
    for message in run_jobs([job], limit_s=TIME_LIMIT, preload=["benchmarks.zoo.check"]):
        if isinstance(message, Result):
            return message.value  # type: ignore[no-any-return]
        failed = dataclasses.replace(failed, failure=message.failure)
    return failed


def _check(path: Path, name: str, mode: str, _deadline: float) -> Iterator[Checked]:
    yield check_named(path, name, mode)


def read_results(path: Path) -> list[Checked]:
    """Read the results that a file holds; none if there is no file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [Checked(**json.loads(line)) for line in lines]


def write_results(path: Path, results: Sequence[Checked]) -> None:
    """Write one JSON object a line, by mode and name; values that are the default are left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Checked)}
    ordered = sorted(results, key=lambda result: (list(MODES).index(result.mode), result.name))
    rows = [
        {name: value for name, value in dataclasses.asdict(result).items() if value != defaults[name]}
        for result in ordered
    ]
    write_lines(path, rows)


def summary(results: Sequence[Checked]) -> list[str]:
    """One line per mode."""
    lines = []
    for mode in MODES:
        of_mode = [r for r in results if r.mode == mode and not r.skipped]
        if of_mode:
            right = [r for r in of_mode if r.right]
            bitwise = sum(r.gradient_difference == 0 for r in right)
            exact = sum(r.flops_difference == 0 for r in of_mode)
            families = len({r.family for r in right})
            lines.append(
                f"{mode}: gradients right for {len(right)} of {len(of_mode)} models ({families} families, "
                f"{bitwise} bit for bit); predicted FLOPs equal to counted for {exact}"
            )
    return lines


def main(
    models: Annotated[list[str] | None, typer.Option(help="model classes; all by default")] = None,
    modes: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(MODES)}")] = None,
    architectures: Annotated[Path, typer.Option(help="file of configuration values")] = ARCHITECTURES,
    output: Annotated[Path, typer.Option(help="results; an existing file is continued")] = Path("zoo.jsonl"),
) -> None:
    """Check the backend on many architectures."""
    known = read_architectures(architectures)
    chosen = models or list(known)
    for name in [*chosen, *(modes or [])]:
        if name not in known and name not in MODES:
            raise typer.BadParameter(f"{name!r} is neither a model of {architectures} nor a mode")
    results = read_results(output)
    done = {(r.name, r.mode) for r in results}
    wanted = [(m, n) for m in modes or ["whole-eager", "blocks-eager"] for n in chosen if (n, m) not in done]
    console = Console()
    for mode, name in track(wanted, description="checking", console=console):
        result = check_in_process(architectures, name, known[name].family, mode)
        results.append(result)
        write_results(output, results)
        if not (result.right or result.skipped) or result.flops_difference:
            console.print(f"{name} {mode}: {result}", highlight=False)
    console.print(*summary(results), sep="\n", highlight=False)
