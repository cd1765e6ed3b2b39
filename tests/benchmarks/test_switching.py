"""The switching benchmark at toy sizes: every part runs and its table has the rows it promises."""

import math
import os
import random
from dataclasses import replace

import pytest
import torch
import typer
from torch import nn

from benchmarks.dispatch_overhead import CallTimes, Dispatch
from benchmarks.switching import (
    OURS,
    PARTS,
    Compiled,
    Effort,
    Switching,
    compare_depths,
    depth_table,
    depth_verdicts,
    dispatch_verdicts,
    main,
    make_workload,
    measure_switching,
    run_part,
    switching_rivals,
    switching_table,
    switching_verdicts,
)
from gtcompile.tools.bench.baselines import (
    WORKLOADS,
    Compilations,
    Rival,
    Workload,
    compilations,
    eager,
    freeze,
    hoisted_blocks,
    plain_blocks,
    random_sets,
)
from gtcompile.tools.bench.measurement import (
    Contender,
    alternate,
    in_turns,
    median_interval,
    ratios,
    spread,
    verdict,
)
from gtcompile.tools.common.step_memory import peak_bytes, saved_bytes, step_memory

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


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_hoisted_blocks_switch_without_compiling(kind: str) -> None:
    workload = tiny(kind, layers=3)
    names = [name for name, _ in workload.model().named_parameters()]
    result = measure_switching("ours", hoisted_blocks(workload), random_sets(names, 8, seed=1), CPU)
    assert len(result.first_steps) == 7
    assert result.done == Compilations(captures=0, compiled=0)


def test_hoisted_blocks_of_any_number_compile_two_forwards_and_a_chain() -> None:
    for layers in (2, 4):
        torch.compiler.reset()
        before = compilations()
        rival = hoisted_blocks(tiny(layers=layers))
        rival.step()
        assert compilations() - before == Compilations(captures=1, compiled=3)


def test_plain_blocks_compile_for_new_sets() -> None:
    workload = tiny()
    names = [name for name, _ in workload.model().named_parameters()]
    sets = [frozenset(names), frozenset(n for n in names if n.endswith("fc1.weight"))]
    result = measure_switching("plain", plain_blocks(workload), sets, CPU)
    assert result.done.captures > 0
    assert result.done.compiled > 0


def test_the_switching_table_has_a_row_per_rival() -> None:
    made = switching_rivals(50, 3)
    assert {tries for _, tries in made.values()} == {50, 10, 3}
    assert next(iter(made)) == OURS
    results = [
        Switching(rival=name, first_steps=(1.0,) * tries, ordinary_s=1.0, done=Compilations(0, 0))
        for name, (_, tries) in made.items()
    ]
    table = switching_table(results, CPU)
    assert table.row_count == 7
    assert [column.header for column in table.columns][-1] == "compiled"  # seconds are for a GPU's table


@pytest.mark.parametrize(("part", "rows"), [("steady", 8), ("memory", 8), ("dispatch", 2)])
def test_every_part_prints_its_rows_and_a_verdict_per_target(part: str, rows: int) -> None:
    table, lines = run_part(part, tiny(), EFFORT)
    assert table.row_count == rows
    assert lines
    assert all("met (" in line or "MISSED (" in line for line in lines)


@pytest.mark.long
def test_every_rival_switches() -> None:
    table, lines = run_part("switching", tiny(), EFFORT)
    assert table.row_count == 7
    assert "met" in lines[-1]  # no captures, no compilations


@pytest.mark.long
def test_depth_changes_no_count() -> None:
    shallow, deep = compare_depths(tiny(), (2, 3))
    assert (shallow.depth, deep.depth) == (2, 3)
    assert shallow.done == deep.done == Compilations(captures=1, compiled=3)


def test_missed_targets_are_said_to_be_missed() -> None:
    slow = Switching(rival=OURS, first_steps=(1.0, 1.5, 3.0), ordinary_s=1.0, done=Compilations(1, 2))
    assert ["MISSED" in line for line in switching_verdicts([slow])] == [True] * 4
    steep = [Compiled(depth=d, seconds=float(d), done=Compilations(1, d)) for d in (2, 4)]
    assert depth_table(steep, CPU).row_count == 2
    assert ["MISSED" in line for line in depth_verdicts(steep)] == [True, True]
    dispatch = Dispatch(
        plain=CallTimes(forward_us=100.0, backward_us=100.0),
        hoisted=CallTimes(forward_us=131.0, backward_us=150.0),
    )
    assert "MISSED" in dispatch_verdicts(dispatch)[0]
    assert dispatch.backward_us == 50.0
    assert verdict(1.0, 1.0) == "met (at most 1)"


def test_memory_of_hoisted_blocks_is_never_above_that_of_eager_freezing() -> None:
    workload = tiny(hidden=128, layers=3, rows=2, length=64)
    names = [name for name, _ in workload.model().named_parameters()]
    ours, theirs = hoisted_blocks(workload), eager(workload)
    for trained in (None, *random_sets(names, 4, seed=2)):
        for rival in (ours, theirs):
            rival.switch_and_step(trained)
        mine, eagers = step_memory(ours, CPU), step_memory(theirs, CPU)
        assert mine.saved <= eagers.saved
        assert mine.peak <= eagers.peak * 1.02  # beside the head and its logits, a few buffers come and go


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    batch = torch.ones(3, 4)
    # the input, saved by the first layer, and the sigmoid's output, saved by it and by the second layer
    assert saved_bytes(lambda: model(batch).sum(), model) == 4 * (3 * 4 + 3 * 8)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(lambda: model(batch).sum(), model) == 4 * 3 * 8


def test_the_peak_is_what_is_held_at_once() -> None:
    def hold_one_of_two() -> None:
        for _ in range(2):
            torch.empty(1 << 18)

    def hold_both() -> None:
        kept = [torch.empty(1 << 18) for _ in range(2)]
        del kept

    assert peak_bytes(hold_one_of_two, CPU) == 1 << 20
    assert peak_bytes(hold_both, CPU) == 2 << 20


def test_contenders_take_turns_and_prepare_untimed() -> None:
    order: list[str] = []
    contenders = {
        name: Contender(
            lambda name=name: order.append(f"prepare {name}"), lambda name=name: order.append(name)
        )
        for name in "ab"
    }
    times = alternate(contenders, 2, CPU, runs=2)
    turn = {name: [f"prepare {name}", name, name] for name in "ab"}
    assert order == [*turn["a"], *turn["b"], *turn["b"], *turn["a"]]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_two_calls_take_turns_at_being_first() -> None:
    order: list[str] = []
    found = in_turns(lambda: order.append("a"), lambda: order.append("b"), 3, CPU)
    assert "".join(order) == "abbaab"
    assert len(found) == 3


def test_the_interval_of_a_median_holds_it_19_times_of_20() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        found = median_interval(generator.expovariate(1.0) for _ in range(42))
        held += found.low <= math.log(2) <= found.high
    assert 0.92 <= held / 400 <= 0.99
    assert str(median_interval([3.0, 1.0, 2.0])) == "2 (1-3)"


def test_ratios_are_taken_round_by_round() -> None:
    assert str(ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])) == "2 (1-3)"
    assert spread([3.0, 1.0, 2.0, 4.0]).median == 2.5


def test_random_sets_are_drawn_by_their_seed_and_never_empty() -> None:
    names = ["a", "b", "c"]
    sets = random_sets(names, 30, seed=0)
    assert sets == random_sets(names, 30, seed=0) != random_sets(names, 30, seed=1)
    assert all(chosen and chosen <= set(names) for chosen in sets)
    assert {len(chosen) for chosen in sets} == {1, 2, 3}


def test_a_rival_trains_exactly_what_it_is_told() -> None:
    workload = tiny()
    rival = Rival(workload, lambda model: model, freeze)
    before = {name: p.detach().clone() for name, p in rival.model.named_parameters()}
    rival.switch_and_step(frozenset({"model.decoder.layers.1.fc1.weight"}))
    changed = {name for name, p in rival.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.decoder.layers.1.fc1.weight"}


@pytest.mark.parametrize(("name", "billions"), [("opt-2.7b", 2.65), ("llama-3b", 3.2)])
def test_the_workloads_for_a_gpu_have_the_size_they_say(name: str, billions: float) -> None:
    workload = make_workload(name, torch.device("meta"), torch.bfloat16)
    assert (workload.rows, workload.length) == (4, 512)
    parameters = list(workload.model().parameters())
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx(billions, rel=0.15)
    assert {p.dtype for p in parameters} == {torch.bfloat16}


def test_sizes_given_replace_those_of_the_workload() -> None:
    workload = tiny(rows=2)
    assert replace(workload, rows=4).rows == 4
    assert all(value.shape == (2, 4) for value in workload.batch().values())
    assert str(workload) == "OPT-shaped decoder, 2 layers, width 64, vocabulary 32, batches of 2 x 4, float32"


def test_the_command_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(only=["dispatch"], **TINY)
    printed = capsys.readouterr().out
    assert "OPT-shaped decoder, 2 layers" in printed
    assert "dispatching a region call" in printed


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


def test_every_workload_can_be_made() -> None:
    for name in WORKLOADS:
        assert make_workload(name, CPU, None).dtype is torch.float32
