"""The TensorBoard trace: what it holds is what the run's own files hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gtcompile.graph.module_paths import block_of_parameter
from gtcompile.tools.finetune.run import finetune
from gtcompile.tools.finetune.tensorboard_trace import TensorBoardTrace, open_trace
from gtcompile.tools.runs.settings import Settings
from tests.tools.test_finetune import reporter


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    records = [{"source": f"number {n}", "target": f"it is {n}"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Settings(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "data.jsonl"),
        epochs=2,
        batch_size=4,
        max_length=48,
        max_new_tokens=2,
        budget=0.6,
    )


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    read: Any = event_accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_loss_flops_selection_and_importance_are_those_of_the_runs_files(
    settings: Settings, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    run = tmp_path / "run"
    finetune(settings, run, reporter(), log_to="tensorboard")
    found = scalars(run / "tensorboard")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["train/loss"] == pytest.approx({m["step"]: m["loss"] for m in metrics}, rel=1e-6)
    assert found["flops/predicted"] == pytest.approx({m["step"]: m["flops"] for m in metrics}, rel=1e-6)
    selections = json.loads((run / "selections.json").read_text())
    assert list(found["selection/parameters"].values()) == [len(s["trained"]) for s in selections]
    assert found["flops/predicted_share"] == found["flops/counted_share"]
    block = "model.layers.1"
    for value, selection in zip(found[f"trained/{block}"].values(), selections, strict=True):
        assert value == sum(block_of_parameter(fqn) == block for fqn in selection["trained"])
    for value, selection in zip(found[f"importance/{block}"].values(), selections, strict=True):
        importance = selection["importance"].items()
        assert value == pytest.approx(
            sum(number for fqn, number in importance if block_of_parameter(fqn) == block), rel=1e-6
        )


def test_steps_taken_again_after_a_resume_replace_the_first(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    for first, last, loss in ((0, 4, 1.0), (2, 3, 2.0)):
        trace = TensorBoardTrace(tmp_path / "trace")
        for step in range(first, last):
            trace.stepped({"step": step, "loss": loss, "lr": 0.1, "seconds": 0.1, "flops": 10})
        trace.close()
    assert scalars(tmp_path / "trace")["train/loss"] == {0: 1.0, 1: 1.0, 2: 2.0}


def test_nothing_is_written_where_no_trace_is_asked_for(settings: Settings, tmp_path: Path) -> None:
    assert open_trace(None, tmp_path) is None
    finetune(replace(settings, epochs=1), tmp_path / "run", reporter())
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_an_unknown_target_is_refused_before_any_work(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--log-to: expected tensorboard, got 'wandb'"):
        finetune(settings, tmp_path / "run", reporter(), log_to="wandb")
    assert not (tmp_path / "run").exists()
