"""The switching benchmark at toy sizes, and the statements of the documentation that it measures."""

import math
import os
import random

import pytest
import torch
import typer

from benchmarks.measurement import median_interval
from benchmarks.steady_state import step_memory
from benchmarks.switching import (
    PARTS,
    Effort,
    compare_depths,
    main,
    make_workload,
    measure_switching,
    run_part,
)
from benchmarks.workloads import Workload, hoisted_blocks, random_sets
from gtcompile.tools.bench.baselines import Compilations, eager

CPU = torch.device("cpu")
TINY = {"layers": 2, "hidden": 64, "vocabulary": 32, "rows": 1, "length": 4}
EFFORT = Effort(sets=2, slow_sets=1, rounds=2, seed=0, depths=(2, 3), budgets=(0.6,))


@pytest.fixture(autouse=True)
def inductor_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a benchmark does to the environment ends with its test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if not os.environ["TORCHINDUCTOR_CACHE_DIR"]:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def tiny(kind: str = "opt", **sizes: int) -> Workload:
    return make_workload(kind, CPU, None, **(TINY | sizes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_hoisted_blocks_switch_without_compiling(kind: str) -> None:
    workload = tiny(kind, layers=3)
    names = [name for name, _ in workload.model().named_parameters()]
    result = measure_switching("ours", hoisted_blocks(workload), random_sets(names, 8, seed=1), CPU)
    assert len(result.first_steps) == 7
    assert result.done == Compilations(captures=0, compiled=0)


@pytest.mark.long
@pytest.mark.parametrize(("part", "rows"), [("switching", 7), ("steady", 8), ("memory", 8), ("dispatch", 2)])
def test_every_part_runs(part: str, rows: int) -> None:
    table, lines = run_part(part, tiny(), EFFORT)
    assert table.row_count == rows
    if part == "switching":
        assert lines[-1] == "captures and compilations after the first set, 0: met (at most 0)"


@pytest.mark.long
def test_depth_changes_no_count() -> None:
    shallow, deep = compare_depths(tiny(), (2, 3))
    assert (shallow.depth, deep.depth) == (2, 3)
    assert shallow.done == deep.done == Compilations(captures=1, compiled=3)


@pytest.mark.slow
def test_memory_of_hoisted_blocks_is_never_above_that_of_eager_freezing() -> None:
    workload = tiny(hidden=128, layers=3, rows=2, length=64)
    names = [name for name, _ in workload.model().named_parameters()]
    ours, theirs = hoisted_blocks(workload), eager(workload)
    for trained in (None, *random_sets(names, 4, seed=2)):
        for candidate in (ours, theirs):
            candidate.switch_and_step(trained)
        mine, eagers = step_memory(ours, CPU), step_memory(theirs, CPU)
        assert mine.saved <= eagers.saved
        assert mine.peak <= eagers.peak * 1.02  # a few small buffers come and go


def test_the_interval_of_a_median_holds_it_19_times_of_20() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        found = median_interval(generator.expovariate(1.0) for _ in range(42))
        held += found.low <= math.log(2) <= found.high
    assert 0.92 <= held / 400 <= 0.99
    assert str(median_interval([3.0, 1.0, 2.0])) == "2 (1-3)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": "gpt"}, "known are opt, llama"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"only": ["speed"]}, f"known are {', '.join(PARTS)}"),
    ],
)
def test_a_mistaken_option_is_refused_before_any_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        main(**arguments)
