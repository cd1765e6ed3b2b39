"""The plan for a model and a budget, without weights."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, T5Config

from gtcompile.errors import BudgetError
from gtcompile.tools.inspection import Inspection, inspect_shape


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with nothing but a configuration."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
    ).save_pretrained(folder)
    return str(folder)


def inspect(model: str, budget: float = 0.6, importances: Path | None = None) -> Inspection:
    return inspect_shape(model, budget, batch_size=2, length=8, target_length=4, importances=importances)


@pytest.fixture(scope="module")
def inspection(config_only: str) -> Inspection:
    return inspect(config_only)


def test_a_configuration_is_enough(inspection: Inspection) -> None:
    rows = {row["parameter"]: row for row in inspection.rows()}
    assert rows["lm_head.weight"]["shape"] == [260, 16]
    assert rows["lm_head.weight"]["dw_flops"] == 2 * 2 * 8 * 16 * 260  # 2 per multiply-add, 2 x 8 positions


def test_marginal_flops_are_what_the_plan_changes_by(inspection: Inspection) -> None:
    trained, costs = inspection.selection.trained, inspection.costs
    for row in inspection.rows():
        with_it, without = trained | {row["parameter"]}, trained - {row["parameter"]}
        assert row["marginal_flops"] == costs.step_flops(with_it) - costs.step_flops(without)


def test_the_plan_keeps_the_budget_and_is_marked_in_the_rows(inspection: Inspection) -> None:
    totals = inspection.totals()
    assert totals["forward_flops"] < totals["step_flops"] <= totals["budget_flops"] < totals["full_flops"]
    marked = {row["parameter"] for row in inspection.rows() if row["status"] == "trained"}
    assert marked == inspection.selection.trained


def test_an_unknown_importance_is_said_to_be_one(inspection: Inspection) -> None:
    assert any("not known without a run" in line for line in inspection.lines())


def test_it_is_plain_json(inspection: Inspection) -> None:
    assert json.loads(json.dumps(inspection.as_dict()))["batch"] == "2 x 8 tokens"


def test_importances_of_a_run_are_used(config_only: str, inspection: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "selections.json"
    path.write_text(json.dumps([{"importance": {}}, {"importance": {"model.norm.weight": 2.0}}]))
    result = inspect(config_only, importances=path)
    assert "model.norm.weight" in result.selection.trained
    assert {row["parameter"]: row["importance"] for row in result.rows()}["model.norm.weight"] == 2.0
    assert result.selection.trained != inspection.selection.trained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not the selections.json"),
        ("[]", "not the selections.json"),
        ('[{"importance": {}}]', "--method adaptive"),
        ('[{"importance": {"other.weight": 1.0}}]', "another model: it names other.weight"),
    ],
)
def test_other_files_are_refused(config_only: str, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "selections.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        inspect(config_only, importances=path)


def test_a_budget_below_the_minimum_names_it(config_only: str) -> None:
    with pytest.raises(BudgetError, match="too small"):
        inspect(config_only, budget=0.1)


def test_an_encoder_decoder_has_answers_of_their_own_length(tmp_path: Path) -> None:
    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    result = inspect(str(tmp_path))
    assert result.batch == "2 x 8 tokens, 4 answer tokens"
    assert result.costs.full_flops > result.costs.forward_flops


def test_no_weights_are_made(config_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("torch.nn.init.normal_", lambda tensor, *_, **__: made.append(tensor) or tensor)
    inspect(config_only)
    assert all(tensor.device == torch.device("meta") for tensor in made)
