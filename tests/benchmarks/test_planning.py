"""The planning benchmark measures what it says and its tables hold one row for each."""

import pytest
import typer
from transformers import OPTConfig

from benchmarks.planning import (
    GIGABYTES,
    SECONDS,
    Planning,
    TimedSelection,
    main,
    measure_planning,
    peak_gigabytes,
    selection_table,
    stage_table,
    verdicts,
)
from gtcompile.tools.bench.measurement import in_fresh_process


@pytest.fixture(scope="module")
def planning() -> Planning:
    """Planning for an OPT of two layers."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return measure_planning("tiny", config, (2, 8, 4), (0.6, 0.9))


def test_every_stage_and_budget_is_timed(planning: Planning) -> None:
    assert [name for name, _ in planning.stages] == ["build", "capture", "costs"]
    assert all(seconds > 0 for _, seconds in planning.stages)
    assert [s.budget for s in planning.selections] == [0.6, 0.9]
    assert planning.seconds >= sum(seconds for _, seconds in planning.stages)


def test_selections_keep_their_budgets_with_proof(planning: Planning) -> None:
    assert all(s.spent <= s.budget and s.gap == 0.0 for s in planning.selections)


def test_tables_have_a_row_per_model_and_per_selection(planning: Planning) -> None:
    assert stage_table([planning, planning]).row_count == 2
    assert selection_table([planning, planning]).row_count == 4


def planning_of(model: str, seconds: float, gigabytes: float, gap: float) -> Planning:
    selection = TimedSelection(budget=0.5, spent=0.5, seconds=0.5, cpu_seconds=0.5, gap=gap)
    return Planning(
        model=model,
        nodes=1,
        parameters=1,
        stages=(("capture", seconds),),
        selections=(selection,),
        cpu_seconds=seconds,
        peak_gigabytes=gigabytes,
    )


def test_targets_are_said_to_be_met_or_missed() -> None:
    name = "OPT-2.7B"
    good = verdicts(planning_of(name, SECONDS[name] - 1, GIGABYTES[name], 0.0))
    bad = verdicts(planning_of(name, SECONDS[name], GIGABYTES[name] + 1, 0.01))
    assert ["MISSED" in line for line in good] == [False] * 4
    assert ["MISSED" in line for line in bad] == [True, True, False, True]


def test_an_unknown_model_is_refused_before_any_work() -> None:
    with pytest.raises(typer.BadParameter, match="known are OPT-350M"):
        main(["OPT-13B"])


def peak_by_name(_: str) -> float:
    return peak_gigabytes()


def test_memory_of_a_fresh_process_does_not_hold_what_this_one_had() -> None:
    held = bytearray(1 << 30)
    own = peak_gigabytes()
    del held
    assert in_fresh_process(peak_by_name, "") < own - 0.5
