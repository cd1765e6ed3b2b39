"""The plan for a model and a budget, without weights."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import FSMTConfig, FSMTForConditionalGeneration, LlamaConfig, T5Config

from gtcompile import BudgetError
from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.inspect.command import Traced, inspect_shape, inspection_of_run
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.options import PlanOptions
from gtcompile.tools.models.loading import model_with_values
from gtcompile.tools.models.random_batch import random_batch
from gtcompile.tools.runs.run_record import RunRecord


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with nothing but a configuration."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
    ).save_pretrained(folder)
    return str(folder)


def inspect(model: str, budget: float = 0.6, importances: Path | None = None) -> Inspection:
    shape = BatchShape(batch_size=2, length=8, target_length=4)
    return inspect_shape(model, PlanOptions(budget=budget, shape=shape, importances=importances))


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
        ('[{"importance": {}}]', "--policy best"),
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


def branching(folder: Path, *, weights: bool) -> str:
    """An encoder-decoder that asks, at every call, whether its attention mask masks anything."""
    config = FSMTConfig(
        src_vocab_size=20,
        tgt_vocab_size=20,
        langs=["en", "de"],
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=32,
    )
    (FSMTForConditionalGeneration(config) if weights else config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("weights", [False, True])
def test_a_model_that_branches_on_data_is_run_with_the_weights_it_has(tmp_path: Path, weights: bool) -> None:
    name, console = branching(tmp_path, weights=weights), Console(record=True)
    shape = BatchShape(batch_size=2, length=6, target_length=6)
    result = inspect_shape(name, PlanOptions(budget=0.9, shape=shape), console)
    whose = f"the weights of {name}" if weights else "random weights"
    assert result.values == f"{whose} and random tokens"
    assert f"run once with {whose}" in console.export_text(clear=False).replace("\n", "")
    assert result.lines()[0].startswith("the forward branches on data")
    model, _ = model_with_values(name, FSMTConfig.from_pretrained(name))
    costs = costs_of(capture(model, random_batch(model, shape)))
    assert result.costs.full_flops == costs.full_flops


class Sign(nn.Module):
    """Which layer runs depends on the sign of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 4), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.wide(x) if x.sum() > 0 else self.narrow(x)).square().mean()


def selected_with(model: nn.Module, x: torch.Tensor, path: Path) -> RunRecord:
    """A run that selected everything, by the costs of this batch."""
    costs = costs_of(capture(model, {"x": x}))
    selection = {
        "importance": {},
        "importance_bound": None,
        "epoch": 0,
        "trained": sorted(costs.fqns),
        "selectable": len(costs.fqns),
        "step_flops": costs.full_flops,
        "budget_flops": costs.full_flops,
        "full_flops": costs.full_flops,
    }
    settings = {"batch_shape": "2 x 4", "epochs": 1}
    return RunRecord(path=path, settings=settings, selections=[selection], metrics=[], summary=None)


def test_a_run_on_a_graph_that_goes_another_way_says_so_and_keeps_its_numbers(tmp_path: Path) -> None:
    model = Sign()
    run = selected_with(model, torch.ones(2, 4), tmp_path)
    other = Traced(capture(model, {"x": -torch.ones(2, 4)}), "another batch")
    inspection = inspection_of_run(run, other, "Sign")
    assert inspection.selection.step_flops == run.selections[-1]["step_flops"]
    assert not inspection.selection.trained  # none of the layers that the run trained is used here
    assert "another batch" in inspection.lines()[0]
    assert inspection.rows()
