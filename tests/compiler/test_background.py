"""Compiling beside the training: in another process, for sets that stay, and only where it is faster."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from gtcompile.compiler import background
from gtcompile.compiler.background import PATIENCE, TRIALS, Contest


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a contender says so."""
    now = [0.0]
    monkeypatch.setattr(background, "_clock", lambda device: now[0])
    return now


@dataclass
class Work:
    """What another process would do."""

    ended: bool = True
    why: str = ""

    def done(self) -> bool:
        return self.ended

    def failure(self) -> str:
        return self.why


def contest(clock, challenger_takes: float, *answers: Work | None) -> tuple[Contest, list[str]]:
    """The present way takes one second."""
    ran: list[str] = []
    coming = list(answers)

    def way(name: str, seconds: float):
        def run(inputs):
            ran.append(name)
            clock[0] += seconds
            return inputs

        return run

    def prepare() -> Work | None:
        ran.append("prepare")
        return coming.pop(0)

    return Contest(way("present", 1.0), prepare, lambda: way("challenger", challenger_takes)), ran


@pytest.mark.parametrize(("takes", "stays"), [(0.5, "challenger"), (1.5, "present")])
def test_the_faster_way_stays(clock, takes, stays):
    race, ran = contest(clock, takes, Work())
    for _ in range(PATIENCE + 2 * TRIALS + 10):
        race([])
    assert race.decided
    assert ran.count("prepare") == 1
    assert set(ran[-5:]) == {stays}
    assert min(ran.count("present"), ran.count("challenger")) > TRIALS


def test_nothing_is_compiled_for_a_set_that_goes_soon(clock):
    race, ran = contest(clock, 0.5, Work())
    for _ in range(PATIENCE - 1):
        race([])
    assert set(ran) == {"present"}


def test_until_the_code_is_there_the_present_way_runs(clock):
    work = Work(ended=False)
    race, ran = contest(clock, 0.5, None, None, work)  # busy at first
    for _ in range(3 * PATIENCE):
        race([])
    assert set(ran) == {"present", "prepare"}
    assert ran.count("prepare") == 3
    work.ended = True
    for _ in range(3 * PATIENCE):
        race([])
    assert ran[-1] == "challenger"


def test_a_failure_of_the_other_process_is_said_and_changes_nothing(clock, caplog):
    race, ran = contest(clock, 0.5, Work(why="no compiler"))
    with caplog.at_level(logging.WARNING, logger="gtcompile.compiler.background"):
        for _ in range(2 * PATIENCE):
            race([])
    assert "no compiler" in caplog.text
    assert set(ran) == {"present", "prepare"}
    assert race.decided


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of processes with a disk cache of their own, empty at first; headers of torch are compiled once."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


def test_what_another_process_compiled_is_taken_from_the_disk_and_right(environment):
    command = [sys.executable, "-m", "tests.ranks.background_run"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("right")


SECOND_RUN = """
from gtcompile.compiler.blocks import compile_blocks
from gtcompile.torch_internals import dynamo_counters
from gtcompile.state.trained_set import train_only
from tests.support.models import Recipe, make_batch, step
model, batch = Recipe(("norm",) * 3).model(), make_batch()
compile_blocks(model)
for trained in (None, ["layers.1.*"], ["layers.2.norm.*"]):
    train_only(model, trained)
    step(model, batch)
counters = dynamo_counters["inductor"]
print(counters["fxgraph_cache_miss"], counters["fxgraph_cache_hit"])
"""


def test_a_second_run_compiles_nothing_new(environment):
    command = [sys.executable, "-c", SECOND_RUN]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["3", "0"], ["0", "3"]], runs[-1].stderr
