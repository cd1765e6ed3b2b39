"""Check the backend on many architectures and write a table: `python -m benchmarks.zoo`.

Each model is checked in its own process. The table is written after each model, and models that it already
holds are not checked again, so an interrupted run can be continued.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.processes import Job, Result, run_jobs
from benchmarks.zoo.check import MODES, Checked, check_named
from benchmarks.zoo.models import ARCHITECTURES, read_architectures
from gtcompile.tools.common.files import write_text

TIME_LIMIT = 600.0
"""Seconds for one model."""
HEADER = "| model | family | mode | regions | parameters | sets | gradients | FLOPs | s | |"
REMARK = re.compile(r"(right|-|\*\*WRONG\*\*)(?: \(in double precision (\S+)\))? *(.*)")
"""The last cell of a row."""


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


def table(results: Iterable[Checked]) -> str:
    """A Markdown table, one row per model and mode."""
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    for r in sorted(results, key=lambda r: (list(MODES).index(r.mode), r.name)):
        right = "right" if r.right else "-" if r.skipped else "**WRONG**"
        flops = "" if r.flops_difference is None else str(r.flops_difference)
        gradients = f"{r.gradient_difference:.1e}" if r.sets else ""
        cells = (r.name, r.family, r.mode, r.regions, r.parameters, r.sets, gradients, flops, r.seconds)
        settled = "" if r.double_difference is None else f"(in double precision {r.double_difference:.1e})"
        remark = " ".join(filter(None, (right, settled, r.failure.replace("|", "/").strip())))
        lines.append(f"| {' | '.join(map(str, cells))} | {remark} |")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> list[Checked]:
    """Read the rows of a table, to the digits that they have."""
    _, _, rows = text.partition(HEADER)
    return [_read_row(row) for row in rows.splitlines()[2:]]


def _read_row(row: str) -> Checked:
    *cells, remark = (cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split(" | "))
    name, family, mode, regions, parameters, sets, gradients, flops, seconds = cells
    match = REMARK.fullmatch(remark)
    assert match, row
    _, double, failure = match.groups()
    return Checked(
        name=name,
        family=family,
        mode=mode,
        regions=int(regions),
        parameters=int(parameters),
        sets=int(sets),
        gradient_difference=float(gradients or 0),
        double_difference=float(double) if double else None,
        flops_difference=int(flops) if flops else None,
        seconds=float(seconds),
        failure=failure,
    )


def with_table(text: str, results: Sequence[Checked]) -> str:
    """Replace the table in a file; the text above it stays, except for the lines of the summary."""
    heading, _, _ = text.partition(HEADER)
    for line in summary(results):
        mode = line.partition(":")[0]
        heading = re.sub(rf"^\* {mode}: .*$", f"* {line}", heading, flags=re.MULTILINE)
    return heading + table(results)


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
    output: Annotated[Path, typer.Option(help="the table; an existing one is continued")] = Path("zoo.md"),
) -> None:
    """Check the backend on many architectures."""
    known = read_architectures(architectures)
    chosen = models or list(known)
    for name in [*chosen, *(modes or [])]:
        if name not in known and name not in MODES:
            raise typer.BadParameter(f"{name!r} is neither a model of {architectures} nor a mode")
    text = output.read_text() if output.exists() else ""
    results = read_table(text)
    done = {(r.name, r.mode) for r in results}
    wanted = [(m, n) for m in modes or ["whole-eager", "blocks-eager"] for n in chosen if (n, m) not in done]
    console = Console()
    for mode, name in track(wanted, description="checking", console=console):
        result = check_in_process(architectures, name, known[name].family, mode)
        results.append(result)
        write_text(output, with_table(text, results))
        if not (result.right or result.skipped) or result.flops_difference:
            console.print(f"{name} {mode}: {result}", highlight=False)
    console.print(*summary(results), sep="\n", highlight=False)
