"""Compiling beside the training: in another process, for sets that stay, and only where it is faster."""

import logging
import time
from dataclasses import dataclass

import pytest

from gtcompile import background, hoisted
from gtcompile.background import PATIENCE, TRIALS, Contest
from gtcompile.blocks import compile_blocks
from gtcompile.dependencies import backward_costs
from gtcompile.flops import count_flops
from gtcompile.testing import assert_same_gradients, reference_gradients
from gtcompile.torch_internals import dynamo_counters
from gtcompile.trained import train_only
from tests.models import Recipe, make_batch, step


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
    with caplog.at_level(logging.WARNING, logger="gtcompile.background"):
        for _ in range(2 * PATIENCE):
            race([])
    assert "no compiler" in caplog.text
    assert set(ran) == {"present", "prepare"}
    assert race.decided


def test_what_another_process_compiled_is_taken_from_the_disk_and_right(monkeypatch):
    monkeypatch.setattr(background, "PATIENCE", 2)
    races: list[Contest] = []

    class Watched(Contest):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            races.append(self)

        def _decide(self, challenger) -> None:
            super()._decide(challenger)
            self._present = challenger  # so that it is what runs, however fast it was

    monkeypatch.setattr(hoisted, "Contest", Watched)
    model, batch = Recipe(("attention",) * 2).model(), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, specialize="beside")
    trained = train_only(model, ["layers.*.mlp.up.*", "layers.*.norm.weight"])
    expected = reference_gradients(model, batch)
    step(model, batch)
    misses = dynamo_counters["inductor"]["fxgraph_cache_miss"]
    until = time.monotonic() + 300
    while not all(race.decided for race in races) and time.monotonic() < until:
        time.sleep(0.1)  # the other process is the nicer one
        step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert all(race.decided and min(map(len, race._times)) > TRIALS for race in races)
    with count_flops() as counter:
        step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert counter.get_total_flops() == costs.step_flops(trained)
    assert len(races) == 2  # where the backward ends, and above
    assert dynamo_counters["inductor"]["fxgraph_cache_miss"] == misses
