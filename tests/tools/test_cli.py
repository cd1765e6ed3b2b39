"""The command line: what it prints, what it refuses, and its exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner, Result

from gtcompile.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=300,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            ffn_dim=32,
            num_attention_heads=2,
            max_position_embeddings=160,
        )
    )


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
        )
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a SciTLDR of 12 records."""
    records = [{"source": [f"Sentence {n}.", "More."], "target": [f"s {n}", "t"]} for n in range(12)]
    (tmp_path / "scitldr").mkdir()
    for split in ("train", "test"):
        (tmp_path / "scitldr" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


GENERATED = ["--args", "predict_with_generate=true", "--args", "eval_strategy=epoch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (llama, [], "plain eager PyTorch"),
        pytest.param(opt, [], "plain eager PyTorch", marks=pytest.mark.long),
        pytest.param(t5, GENERATED, "eval_rouge1", marks=pytest.mark.long),
    ],
)
def test_a_model_without_tokenizer_is_fine_tuned_to_the_end(
    make: Callable[[], PreTrainedModel], more: list[str], said: str, data: Path, tmp_path: Path
) -> None:
    model = save(make(), tmp_path / "model")
    output = tmp_path / "out"
    arguments = [
        "--dataset",
        "scitldr",
        "--data-dir",
        data,
        "--budget",
        0.6,
        "--epochs",
        1,
        "--output",
        output,
    ]
    result = run("finetune", "--model", model, *arguments, *more)
    assert result.exit_code == 0, result.output
    assert said in result.output
    assert "one token per byte was made for it" in result.output
    assert "FLOPs counted" in result.output
    assert (output / "model" / "model.safetensors").is_file()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["predicted_flops"] == summary["counted_flops"] <= 0.6 * summary["full_flops"]


def refused(*arguments: object) -> str:
    """The one line printed for what the user can act on; the exit code is 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def test_a_budget_out_of_range_is_refused() -> None:
    error = refused("finetune", "--model", "demo", "--dataset", "demo", "--budget", 1.5)
    assert error == "error: --budget: expected in (0, 1], got 1.5\n"


def test_a_model_that_is_not_there_is_refused() -> None:
    assert "no model in './nowhere'" in refused("finetune", "--model", "./nowhere", "--dataset", "demo")


def test_an_unknown_dataset_is_refused() -> None:
    assert "expected one of demo" in refused("finetune", "--model", "demo", "--dataset", "squad")


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not empty" in refused("finetune", "--model", "demo", "--dataset", "demo", "--output", tmp_path)


def test_a_run_needs_a_model_and_data() -> None:
    assert "expected --dataset, or a --config or --resume" in refused("finetune", "--model", "demo")


def test_a_run_is_resumed_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": "demo", "dataset": "demo"}')
    assert "leave out --output" in refused("finetune", "--resume", tmp_path, "--output", tmp_path / "other")


def test_a_dataset_without_the_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    error = refused("finetune", "--model", "demo", "--dataset", path, "--source-field", "text")
    assert "no field 'target'; it has 'text'" in error


def test_a_vocabulary_without_room_for_bytes_is_refused(data: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2
    )
    model = save(LlamaForCausalLM(config), tmp_path / "model")
    arguments = ["--dataset", "scitldr", "--data-dir", data]
    assert "vocabulary of 99 is too small" in refused("finetune", "--model", model, *arguments)


def test_an_unknown_policy_lists_the_known() -> None:
    result = run("finetune", "--model", "demo", "--dataset", "demo", "--policy", "lora")
    assert result.exit_code == 2
    assert "last_layers" in result.output


def test_inspect_prints_the_plan_of_a_configuration(tmp_path: Path) -> None:
    t5().config.save_pretrained(tmp_path)
    result = run("inspect", tmp_path, "--budget", 0.6, "--batch-size", 2, "--length", 8, "--target-length", 4)
    assert result.exit_code == 0, result.output
    assert "2 x 8 tokens, 4 answer tokens" in result.output
    assert "shared.weight" in result.output


def test_inspect_prints_json_for_the_batches_of_a_dataset(data: Path, tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path / "model")
    arguments = ["--dataset", "scitldr", "--data-dir", data, "--budget", 0.6, "--json"]
    result = run("inspect", tmp_path / "model", *arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["batch"] == "4 x 32 tokens"
    assert plan["step_flops"] <= plan["budget_flops"]


def test_inspect_refuses_a_budget_below_the_minimum(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    said = refused("inspect", tmp_path, "--budget", 0.1, "--length", 8)
    assert "--budget 0.1 is too small" in said
    assert "budget_fraction" not in said


@pytest.mark.parametrize("option", ["--batch-size", "--length"])
def test_inspect_refuses_an_empty_batch(option: str, tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    assert refused("inspect", tmp_path, option, 0) == f"error: {option}: expected at least 1, got 0\n"
