"""The paper's cost table: its models, its numbers, its rows."""

import pytest
import typer
from transformers import OPTConfig, T5Config

from benchmarks.paper.costs import STEPS, ModelCost, cost_model, cost_table, main
from benchmarks.paper.models import PAPER_MODELS, build_on_meta, make_batch
from gtcompile import backward_costs

TINY_OPT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}


@pytest.fixture(scope="module")
def tiny() -> ModelCost:
    return cost_model("tiny", OPTConfig(**TINY_OPT), (2, 8, 4), (0.01, 0.6, 0.9))


@pytest.mark.slow
def test_a_run_costs_half_its_flops_in_multiply_adds_over_its_steps(tiny: ModelCost) -> None:
    config = OPTConfig(**TINY_OPT)
    costs = backward_costs(build_on_meta(config), make_batch(config, 2, 8, 4))
    assert tiny.peta * 1e15 == pytest.approx(costs.full_flops * STEPS / 2)


def test_a_budget_below_the_minimum_is_shown_as_such(tiny: ModelCost) -> None:
    assert tiny.budgets[0.01] is None
    assert all(comparison.ours <= budget for budget, comparison in tiny.budgets.items() if comparison)
    assert list(cost_table([tiny]).columns[4].cells) == [f"least is {tiny.minimum:.3f}"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("OPT-350M", 0.331),
        ("OPT-1.3B", 1.316),
        ("OPT-2.7B", 2.652),
        ("OPT-6.7B", 6.658),
        ("BLOOMZ-3B", 3.003),
        ("FLAN-T5-XL", 2.850),
    ],
)
def test_the_configurations_have_the_published_models_parameters(name: str, billions: float) -> None:
    model = build_on_meta(PAPER_MODELS[name]())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.slow
def test_the_smallest_model_costs_what_the_paper_says_within_two_percent() -> None:
    cost = cost_model("OPT-350M", PAPER_MODELS["OPT-350M"](), budgets=())
    assert cost.peta == pytest.approx(5.4, rel=0.02)


def test_an_encoder_decoder_gets_targets_of_its_own_length() -> None:
    batch = make_batch(T5Config(decoder_start_token_id=0), 2, 8, 4)
    assert [list(batch[key].shape) for key in ("input_ids", "labels")] == [[2, 8], [2, 4]]


def test_an_unknown_model_is_refused_before_any_work() -> None:
    with pytest.raises(typer.BadParameter, match="known are OPT-350M"):
        main(["OPT-13B"])
