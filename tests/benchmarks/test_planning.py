"""The planning benchmark, on a tiny model."""

import pytest
import typer
from transformers import OPTConfig

from benchmarks.planning import main, measure_planning, selection_table, stage_table, verdicts


def test_a_plan_keeps_its_budgets_with_proof_and_every_stage_is_in_the_tables() -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    planning = measure_planning("tiny", config, (2, 8, 4), (0.6, 0.9))
    assert [name for name, _ in planning.stages] == ["build", "capture", "costs"]
    assert all(s.spent <= s.budget and s.gap == 0.0 for s in planning.selections)
    assert (stage_table([planning]).row_count, selection_table([planning]).row_count) == (1, 2)
    assert "met" in verdicts(planning)[-1]


def test_an_unknown_model_is_refused_before_any_work() -> None:
    with pytest.raises(typer.BadParameter, match="known are OPT-350M"):
        main(["OPT-13B"])
