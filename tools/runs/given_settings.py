"""The settings of a run from what the user gave: options, assignments, a file, or a run to continue."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gtcompile.tools.models.adapters import check_peft
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import Settings, read_config, settings_from, source_of
from gtcompile.tools.runs.training_arguments import parse_assignment


def given_settings(
    options: Mapping[str, Any],
    assignments: Iterable[str],
    *,
    config: Path | None,
    output: Path | None,
    resume: Path | None,
    dry_run: bool,
) -> Settings:
    """Check everything that can be checked without torch, and return the settings.

    Args:
        options: of the command line, by the names of `Settings`; they take precedence over the rest.
        assignments: texts such as `warmup_steps=100`; they take precedence over the file.
        config: a YAML file with settings.
        output: folder of a new run; None for one that is found later.
        resume: folder of a run to continue, with its settings.
        dry_run: whether nothing will be trained.

    Raises:
        ValueError: these contradict each other or the run, or a name, value, folder or data set is wrong.
        ImportError: adapters are asked for, and peft is not installed.
    """
    if resume and (output or config):
        raise ValueError("--resume continues a run in its folder; leave out --output and --config")
    if resume and dry_run:
        raise ValueError(
            "--dry-run plans a run from its beginning: give it --config "
            f"{resume / 'run.json'} instead of --resume"
        )
    folder = RunFolder(resume or output or Path())
    if resume:
        folder.read_settings()
        config = resume / "run.json"
    values = {
        **(read_config(config) if config else {}),
        **dict(map(parse_assignment, assignments)),
        **options,
        "processes": _process_count(),
    }
    settings = settings_from(values)
    if settings.lora is not None:
        check_peft()
    source_of(settings)
    if os.environ.get("RANK", "0") == "0":
        if resume:
            folder.check_same_run(settings)
        elif output and not dry_run:
            folder.check_new()
    return settings


def _process_count() -> int:
    """How many processes torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
