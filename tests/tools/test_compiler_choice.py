"""The compiler of a run follows from what its steps and the code of one block take, by a stand-in clock."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from gtcompile.compiler.blocks import find_blocks
from gtcompile.distributed.ranks import Ranks
from gtcompile.tools.finetune import compiler_choice, recorder
from gtcompile.tools.finetune.compiler_choice import (
    TRIED_FROM,
    BlockTimes,
    Choice,
    Timer,
    choose_compiler,
    with_chosen_compiler,
)
from gtcompile.tools.finetune.run import finetune
from gtcompile.tools.finetune.run import plan as plan_run
from gtcompile.tools.runs.preparation import Prepared, prepare
from gtcompile.tools.runs.settings import Settings, settings_from
from tests.support.finetune import reporter, short_run, tiny_llama

BLOCK = BlockTimes(count=10, generating=40.0, eager=0.03, code=0.02)
"""Of a model whose full step code shortens by 0.1 s."""


def never() -> BlockTimes:
    raise AssertionError("code was generated to try it")


def out_of_memory(*_: object, **__: object) -> float:
    raise torch.OutOfMemoryError("a stand-in")


def measured(*seconds: float) -> Callable[[], float]:
    """Seconds of the first step that is timed, and of the later ones."""
    readings = iter(seconds)
    return lambda: next(readings)


def test_for_thirty_steps_one_is_timed_and_no_code_is_generated() -> None:
    choice = choose_compiler(30, 1.0, measured(0.12), never)
    assert choice == Choice(
        "eager",
        "30 passes of at most 0.12 s take 4 s: generating code takes half a minute or so, and is tried in "
        "runs of 300 s or more, so code is not generated",
    )


def test_a_first_step_that_is_slow_makes_no_run_long() -> None:
    choice = choose_compiler(100, 1.0, measured(4.0, 0.5), never)
    assert choice.compiler == "eager"
    assert "100 passes of 0.5 s take 50 s" in choice.reason


@pytest.mark.parametrize(
    ("passes", "share", "compiler"), [(801, 0.5, "inductor"), (800, 0.5, "eager"), (401, 1.0, "inductor")]
)
def test_code_is_generated_if_a_long_run_wins_it_back(passes: int, share: float, compiler: str) -> None:
    choice = choose_compiler(passes, share, measured(2.0, 2.0), lambda: BLOCK)
    assert choice.compiler == compiler
    saved = round(passes * share * 0.1)
    assert f"generating code takes about 40 s and would save about {saved} s" in choice.reason
    assert choice.reason.endswith("is generated" if compiler == "inductor" else "is not generated")


def test_code_that_is_slower_is_never_generated() -> None:
    slower = replace(BLOCK, code=0.031)
    choice = choose_compiler(10**6, 1.0, measured(2.0, 2.0), lambda: slower)
    assert choice.compiler == "eager"
    assert "would save nothing" in choice.reason


def test_where_no_code_can_be_generated_the_run_is_eager_and_the_reason_is_said() -> None:
    def without_compiler() -> BlockTimes:
        raise RuntimeError("no compiler of C++ was found\nand a long explanation")

    choice = choose_compiler(10**6, 1.0, measured(2.0, 2.0), without_compiler)
    assert choice == Choice(
        "eager",
        "code could not be generated for a block (RuntimeError: no compiler of C++ was found)",
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run of a tiny Llama that leaves the compiler to the command."""
    options: dict[str, Any] = {"tokenizer": "bytes", "policy": "last_layers", "compiler": "auto", "epochs": 2}
    return short_run(tmp_path_factory.mktemp("inputs"), tiny_llama(3), batch_size=6, **options)


def ticking() -> Callable[[], float]:
    """A clock by which every reading is a second after the one before."""
    readings: Iterator[int] = count()
    return lambda: float(next(readings))


@pytest.mark.slow
def test_trying_a_block_changes_nothing_and_counts_what_the_clock_says(settings: Settings) -> None:
    prepared = prepare(settings)
    model = prepared.language.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    timer = Timer(prepared, ticking())
    assert timer.step_seconds() == 1.0
    times = timer.block_times()
    assert times == BlockTimes(count=len(list(find_blocks(model))), generating=0.0, eager=1.0, code=1.0)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


class StandIn:
    """Steps that take 0.12 seconds, of a model with blocks that must not be tried."""

    def __init__(self, prepared: Prepared) -> None:
        self.blocks, self.step_seconds, self.block_times = ["model.layers.0"], lambda: 0.12, never


def test_the_choice_is_said_with_the_seconds_that_the_budget_leaves(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_choice, "Timer", StandIn)
    said: list[str] = []
    prepared = with_chosen_compiler(prepare(settings), said.append, Ranks(None))
    assert prepared.settings == replace(settings, compiler="eager")
    assert said[0].startswith("compiler: timing a step of eager PyTorch")
    assert said[1].startswith("compiler: eager. 6 passes of at most 0.06 s take 0 s: generating code takes")
    whole = replace(settings, policy="full")
    with_chosen_compiler(prepare(whole), said.append, Ranks(None))
    assert "6 passes of at most 0.12 s" in said[3]


def test_a_full_step_that_does_not_fit_the_memory_leaves_the_compiler_of_the_device(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_choice, "seconds_of_step", out_of_memory)
    said: list[str] = []
    prepared = with_chosen_compiler(prepare(settings), said.append, Ranks(None))
    assert prepared.settings.compiler == "eager"
    assert said[1].startswith("compiler: eager. A full step of plain PyTorch does not fit the memory")


@pytest.mark.parametrize("plan", [True, False])
def test_a_run_that_fits_the_memory_ends_well_where_a_full_step_does_not_fit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: bool
) -> None:
    monkeypatch.setattr(recorder, "compare_steps", out_of_memory)
    stream, short = StringIO(), replace(settings, epochs=1, compiler="eager")
    if plan:
        plan_run(short, reporter(stream))
    else:
        assert finetune(short, tmp_path / "run", reporter(stream)).comparison is None
        assert (tmp_path / "run" / "model" / "config.json").is_file()
        assert finetune(short, tmp_path / "run", reporter(stream), resume=True).comparison is None
    assert "does not fit the memory, so steps are not compared with it" in stream.getvalue()


def test_what_was_chosen_at_first_is_no_other_run_for_a_command_that_would_choose(settings: Settings) -> None:
    saved = replace(settings, compiler="eager").as_dict()
    assert settings.differences(saved) == []
    named = replace(settings, compiler="inductor")
    assert named.differences(saved) == ["--compiler was 'eager' and is now 'inductor'"]


@pytest.mark.slow
def test_the_choice_stays_when_the_run_is_resumed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StringIO()
    finetune(replace(settings, epochs=1), tmp_path / "run", reporter(stream))
    assert "compiler: eager. 3 passes of at most" in stream.getvalue()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["compiler"] == "eager"
    monkeypatch.setattr(compiler_choice, "Timer", never)
    summary = finetune(settings, tmp_path / "run", reporter(), resume=True)
    assert (summary.compiler, summary.steps) == ("eager", 6)


def test_a_compiler_that_is_named_is_taken_without_measuring(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_choice, "Timer", never)
    prepared = prepare(replace(settings, compiler="inductor"))
    assert with_chosen_compiler(prepared, print, Ranks(None)) is prepared


def test_the_command_measures_unless_a_compiler_is_named() -> None:
    given = {"model": "demo", "dataset": "demo"}
    assert settings_from(given).compiler == "auto"
    assert settings_from({**given, "compiler": "eager"}).compiler == "eager"
    with pytest.raises(ValueError, match="--compiler: expected one of auto, inductor, eager, got 'fast'"):
        settings_from({**given, "compiler": "fast"})


def test_passes_are_those_of_the_whole_run(settings: Settings) -> None:
    prepared = prepare(replace(settings, args={"gradient_accumulation_steps": 2}), weights=False)
    assert prepared.passes == 2 * 2 * 2  # epochs, steps of an epoch, passes of a step
    limited = prepare(replace(settings, args={"max_steps": 5}), weights=False)
    assert limited.passes == 5
    assert limited.passes * 1.0 < TRIED_FROM
