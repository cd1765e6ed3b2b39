"""What is learned: the methods of `gtcompile compare` on a pretrained model, as many as fit."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.sheet import Sheet

ARMS = ("full", "occasionally_full", "best", "last_layers", "lora", "sampled", "rotating", "lisa")
"""Methods in the order in which they are run."""
SIZES = {"steps": 60, "batch_size": 8, "length": 160, "held_out": 64}
TINY_SIZES = {"steps": 2, "batch_size": 2, "length": 48, "held_out": 2, "measured": 2}


def units(setting: Setting) -> list[str]:
    """The methods."""
    return ["best"] if setting.tiny else list(ARMS)


def measure(setting: Setting, arm: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Train by one method, with one seed, for as many steps as all others."""
    from gtcompile.tools.compare.options import CompareOptions

    options = CompareOptions(
        model=setting.pretrained,
        dataset="demo" if setting.data_dir is None else "scitldr",
        data_dir=setting.data_dir,
        output=setting.output / "quality",
        arms=(arm,),
        seeds=(0,),
        purposes=("steps",),
        plots=False,
        device=setting.device,
        compiler="none" if setting.tiny else "inductor",
        float32=setting.tiny,
        **(TINY_SIZES if setting.tiny else SIZES),
    )
    options.check_packages()
    from gtcompile.tools.compare.command import compare

    compare(options, Console(quiet=True))
    lines = (options.output / "runs.jsonl").read_text("utf-8").splitlines()
    yield next(row for row in map(json.loads, lines) if row["arm"] == arm)


def sheet(saved: Saved) -> Sheet:
    """One row per method, the lowest loss first."""
    results = saved.results
    rows = [
        (
            arm,
            f"{row['flops_fraction']:.3f}",
            f"{row['learning_rate']:g}",
            str(row["steps"]),
            f"{row['loss']:.4f}",
            f"{row['seconds']:.1f}",
        )
        for arm, row in sorted(results.items(), key=lambda item: item[1]["loss"])
    ]
    columns = ("trained", "FLOPs of full", "learning rate", "steps", "held-out loss", "s")
    return Sheet(title="Quality: gtcompile compare, one seed", columns=columns, rows=rows)
