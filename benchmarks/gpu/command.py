"""Run the stages, keep every result the moment it exists, and continue where an earlier call ended."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer
from rich.console import Console

from benchmarks.gpu.records import UNKNOWN, Header, Saved, describe, read
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import STAGES, Stage, measure_unit, with_needs
from benchmarks.processes import Job, Result, run_jobs

PRELOAD = ("benchmarks.gpu.stages",)
WITHOUT_CUDA = {"TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER": "0", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""The process that imports everything, and of which all others are copies, must not ask the CUDA runtime
whether there is a device: then no copy could use one. Inductor asks while it is imported, for this
benchmarker."""
QUIET = {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}
"""Jobs that run out of time are killed; Python's resource tracker would warn of what they leave."""
WIDTH = 180
"""Columns of a file or pipe, so that tables are whole."""
STARTING_S = 300.0
"""Most seconds in which a process must have imported everything and found the device."""


def main(
    output: Annotated[Path, typer.Option(help="folder of the results; an unfinished one is continued")],
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(STAGES)}; what it needs too")] = None,
    tiny: Annotated[bool, typer.Option(help="the smallest sizes, by default on the CPU")] = False,
    device: Annotated[str | None, typer.Option(help="cuda by default")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="for all stages of this call")] = 8.0,
    pretrained: Annotated[str, typer.Option(help="model that the stage quality trains")] = "demo",
    data_dir: Annotated[Path | None, typer.Option(help="SciTLDR for that model; else made-up texts")] = None,
    commit: Annotated[str | None, typer.Option(help="of gtcompile, where there is no git")] = None,
) -> None:
    """Measure everything that gtcompile promises on a GPU.

    Results are kept at once, one JSON file per stage; `python -m benchmarks.gpu.tables FOLDER` writes their
    tables as Markdown.
    """
    started = time.monotonic()
    if unknown := [name for name in only or () if name not in STAGES]:
        raise typer.BadParameter(f"no stage is called {unknown[0]}; known are {', '.join(STAGES)}")
    setting = Setting(
        output=output,
        device=device or ("cpu" if tiny else "cuda"),
        tiny=tiny,
        pretrained=pretrained,
        data_dir=data_dir,
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print("starting")
    with mock.patch.dict(os.environ, WITHOUT_CUDA | QUIET):
        header = _header(setting, commit)
    console.print(str(header))
    if header.commit == UNKNOWN:
        console.print("there is no git here: --commit records which commit is measured")
    names = with_needs(only or list(STAGES))
    saved = {name: _saved(setting, name, header) for name in names}
    output.mkdir(parents=True, exist_ok=True)
    try:
        _run(setting, saved, started + 60 * minutes, console)
    except KeyboardInterrupt:
        console.print(f"stopped; everything measured so far is in {output}, and the same command continues")
        raise typer.Exit(130) from None
    missing = [name for name, now in saved.items() if _missing(setting, now)]
    if missing:
        console.print(f"not complete: {', '.join(missing)}; the same command continues")
        raise typer.Exit(1)


def _header(setting: Setting, commit: str | None) -> Header:
    job = Job("header", describe, (setting.device, setting.tiny, commit))
    for message in run_jobs([job], limit_s=STARTING_S, preload=PRELOAD):
        if isinstance(message, Result):
            header: Header = message.value
            return header
        raise typer.BadParameter(f"device {setting.device}: {message.failure}")
    raise AssertionError("a job without an end")


def _saved(setting: Setting, name: str, header: Header) -> Saved:
    """What the folder has of a stage.

    Raises:
        BadParameter: it was measured elsewhere, or by another commit.
    """
    found = read(setting.output, name)
    if found is None:
        return Saved(folder=setting.output, stage=name, header=header)
    if found.header != header:
        raise typer.BadParameter(
            f"output: {setting.output} has results of {found.header}, and this would be {header}; "
            f"choose another folder"
        )
    return found


def _run(setting: Setting, saved: dict[str, Saved], end: float, console: Console) -> None:
    """Run what is missing; each stage gets its share of the time that is left."""
    for name, before in saved.items():
        stage, missing = STAGES[name], _missing(setting, before)
        later = [STAGES[other] for other in saved if _missing(setting, saved[other])]
        if missing:
            limit = (end - time.monotonic()) * stage.weight / sum(other.weight for other in later)
            console.print(f"{name}: {len(missing)} to measure, at most {max(limit, 0.0):.0f} s")
            saved[name] = _measure(setting, stage, before, missing, limit, console)
        _show(saved[name], console)


def _missing(setting: Setting, saved: Saved) -> list[str]:
    return [unit for unit in STAGES[saved.stage].module.units(setting) if unit not in saved.finished]


def _measure(
    setting: Setting,
    stage: Stage,
    saved: Saved,
    missing: Sequence[str],
    limit_s: float,
    console: Console,
) -> Saved:
    jobs = [Job(unit, measure_unit, (setting, stage.name, unit)) for unit in missing]
    spent, started = saved.seconds, time.monotonic()
    for message in run_jobs(jobs, limit_s=limit_s, workers=stage.processes, preload=PRELOAD):
        unit, taken = message.job, time.monotonic() - started
        if isinstance(message, Result):
            saved = dataclasses.replace(saved, results={**saved.results, unit: message.value})
        else:
            console.print(f"  {taken:4.0f} s  {unit}: {message.failure or 'done'}")
            saved = _ended(saved, unit, message.failure)
        saved = dataclasses.replace(saved, seconds=spent + taken)
        saved.write()
    return saved


def _ended(saved: Saved, unit: str, failure: str) -> Saved:
    failures = {other: why for other, why in saved.failures.items() if other != unit}
    if failure:
        return dataclasses.replace(saved, failures={**failures, unit: failure})
    return dataclasses.replace(saved, failures=failures, finished=(*saved.finished, unit))


def _show(saved: Saved, console: Console) -> None:
    sheet = STAGES[saved.stage].module.sheet(saved)
    if sheet.rows:
        console.print(sheet.table())
    for line in (*sheet.verdicts, *(f"{unit}: {why}" for unit, why in saved.failures.items())):
        console.print(line, markup=False)
