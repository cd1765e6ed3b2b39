"""The time to compile a model's blocks, with an empty cache on disk and with a full one."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.candidates import COMPILED, MAKERS
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.sheet import Sheet
from benchmarks.switching import time_compilation

COLD, WARM = "empty cache", "full cache"


def units(setting: Setting) -> list[str]:
    """Every way that compiles, with each cache."""
    return [f"{way}: {cache}" for cache in (COLD, WARM) for way in COMPILED]


def measure(setting: Setting, unit: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Time the first step; what it takes longer than a later one is for compiling.

    With an empty cache two blocks are compiled: the code does not depend on their number. The full cache is
    that of the stage of plans.
    """
    way, _, cache = unit.partition(": ")
    with contextlib.ExitStack() as stack:
        if cache == COLD:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        workload = setting.block(SHORT) if cache == COLD else setting.workload(SHORT)
        found = time_compilation(MAKERS[way], workload)
        yield {"seconds": found.seconds, **dataclasses.asdict(found.done)}


def sheet(saved: Saved) -> Sheet:
    """One row per way and cache."""
    results = saved.results
    rows = [
        (unit, f"{found['seconds']:.1f}", str(found["captures"]), str(found["compiled"]))
        for unit, found in results.items()
    ]
    title = f"Compilation, three at a time ({SHORT})"
    return Sheet(title=title, columns=("compiled by", "s", "captures", "compiled graphs"), rows=rows)
