"""Runs of `finetune` with LoRA: what peft computes without gtcompile, exact counts, one meaning of full."""

import importlib.util
import json
import os
import signal
import warnings
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from gtcompile.costs.backward_costs import backward_costs
from gtcompile.graph.flops import count_flops
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.finetune.recorder import Recorder
from gtcompile.tools.finetune.run import compare_with_full, finetune, full_run_beside, plan
from gtcompile.tools.finetune.summary import Summary, notes
from gtcompile.tools.finetune.trainer_options import training_arguments
from gtcompile.tools.inspect.command import PlanOptions, inspect_run
from gtcompile.tools.models import adapters
from gtcompile.tools.onnx.command import _model_and_batch
from gtcompile.tools.runs.given_settings import given_settings
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.run_record import read_run
from gtcompile.tools.runs.settings import Settings, settings_from
from tests.support.finetune import reporter, short_run, steps_of, tiny_llama
from tests.support.launching import run, torchrun

peft = pytest.importorskip("peft", reason="peft is not installed")
safetensors = pytest.importorskip("safetensors.torch")

EPOCHS, STEPS_PER_EPOCH, RANK = 2, 3, 1


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run with LoRA, the policy progressive and labelled logits, on 18 records."""
    options: dict[str, Any] = {
        **{"tokenizer": "bytes", "policy": "progressive", "epochs": EPOCHS, "batch_size": 6},
        **{"budget": 0.8, "budget_of": "full_finetuning", "lora": RANK, "labelled_logits": True},
    }
    return short_run(tmp_path_factory.mktemp("inputs"), tiny_llama(4), **options)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, str]:
    """An uninterrupted run: its folder, its summary and what it printed."""
    output, stream = tmp_path_factory.mktemp("finished") / "run", StringIO()
    return output, finetune(settings, output, reporter(stream)), stream.getvalue()


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    """The adapter that a run saved."""
    return safetensors.load_file(output / "model" / "adapter_model.safetensors")  # type: ignore[no-any-return]


def selections_of(output: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads((output / "selections.json").read_text())
    return made


def counted_full_flops(settings: Settings) -> int:
    """FLOPs of a step of full fine-tuning, counted in plain PyTorch on a base that never had adapters."""
    plain = prepare(replace(settings, lora=None, labelled_logits=False))
    with count_flops() as counter:
        plain.language.model(**plain.sample()).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.slow
def test_flops_are_exact_and_shares_are_of_full_fine_tuning(
    finished: tuple[Path, Summary, str], settings: Settings
) -> None:
    output, summary, said = finished
    full = counted_full_flops(settings)
    assert summary.predicted_flops == summary.counted_flops
    assert summary.full_flops == EPOCHS * STEPS_PER_EPOCH * full
    assert summary.comparison is not None
    assert summary.comparison.full_flops == full
    first = selections_of(output)[0]
    assert first["full_flops"] < first["whole_flops"] < full  # with labelled logits
    assert summary.predicted_flops <= 0.8 * EPOCHS * STEPS_PER_EPOCH * first["whole_flops"]
    share = first["step_flops"] / first["whole_flops"]
    assert f"parameters, {share:.1%} of full fine-tuning's FLOPs" in said
    assert "the budget is a share of full fine-tuning's FLOPs" in said
    assert summary.title.startswith(
        f"LoRA of rank {RANK}, progressive, budget 0.8 of full fine-tuning's FLOPs"
    )
    assert "steps that train all weights of the base model, without adapters" in " ".join(notes([summary]))


@pytest.mark.slow
def test_the_adapter_is_in_pefts_format_and_only_it_was_trained(
    finished: tuple[Path, Summary, str], settings: Settings
) -> None:
    output = finished[0]
    assert not list((output / "model").glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(base, output / "model")
    assert loaded.peft_config["default"].r == RANK
    assert loaded.peft_config["default"].lora_alpha == 2 * RANK
    state = loaded.state_dict()
    for name, tensor in adapter_of(output).items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)
    assert any(tensor.any() for name, tensor in adapter_of(output).items() if "lora_B" in name)
    loaded.unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.slow
def test_all_adapters_are_trained_bit_for_bit_as_by_peft_and_a_trainer_without_gtcompile(
    settings: Settings, tmp_path: Path
) -> None:
    full = replace(settings, policy="full", labelled_logits=False)
    summary = finetune(full, tmp_path / "run", reporter())
    assert summary.title == f"LoRA of rank {RANK}, all adapters"
    assert summary.predicted_flops == summary.counted_flops < summary.full_flops
    assert summary.comparison is not None
    prepared = prepare(full)
    model, data = prepared.language.model, prepared.examples
    arguments = training_arguments(full, tmp_path / "plain")
    Trainer(model=model, args=arguments, data_collator=prepared.collate, train_dataset=data).train()  # type: ignore[arg-type]
    expected, actual = peft.get_peft_model_state_dict(model), adapter_of(tmp_path / "run")
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_run_that_ctrl_c_stopped_continues_bit_equal(
    cache: str | None,
    settings: Settings,
    finished: tuple[Path, Summary, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed, steps = Recorder.passed, iter(range(1, 100))

    def press_ctrl_c(*arguments: Any) -> None:
        passed(*arguments)
        if next(steps) == STEPS_PER_EPOCH + 1:
            os.kill(os.getpid(), signal.SIGINT)

    cached = replace(settings, prefix_cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "passed", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            finetune(cached, tmp_path / "run", reporter())
    torch.rand(7)  # another process would not have this random state either
    summary = finetune(cached, tmp_path / "run", reporter(), resume=True)
    own, expected = adapter_of(tmp_path / "run"), adapter_of(finished[0])
    assert [name for name in expected if not torch.equal(own[name], expected[name])] == []
    losses = [[step["loss"] for step in steps_of(folder)] for folder in (tmp_path / "run", finished[0])]
    assert losses[0] == losses[1]
    assert summary.predicted_flops == summary.counted_flops
    assert summary.full_flops == finished[1].full_flops


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_one_adapter_from_the_command_line(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "run"
    asked = {
        **{"model": settings.model, "dataset": settings.dataset, "tokenizer": "bytes", "output": output},
        **{"lora": RANK, "target-modules": "q_proj,v_proj", "budget": 0.8, "policy": "last_layers"},
        **{"epochs": 1, "batch-size": 3, "max-length": 48, "max-new-tokens": 8},
    }
    options = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    result = run(torchrun("-m", "gtcompile", "finetune", *options))
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert f"adapters of rank {RANK} in {2 * 4} layers" in said
    assert "learning rate 0.0002, the default for LoRA" in said
    assert "code is not generated" in said
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["processes"], summary["steps"]) == (2, STEPS_PER_EPOCH)
    assert summary["predicted_flops"] == summary["counted_flops"] <= 0.8 * summary["full_flops"]
    kinds = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter_of(output)}
    assert kinds == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_a_budget_of_a_step_is_a_share_of_the_step_that_trains_all_adapters(settings: Settings) -> None:
    stream = StringIO()
    plan(replace(settings, budget_of="step"), reporter(stream))
    said = stream.getvalue()
    prepared = prepare(settings)
    costs = backward_costs(prepared.language.model, prepared.sample())
    assert f"a step that trains all adapters: {costs.full_flops:.4e} FLOPs" in said
    assert "a step of full fine-tuning in plain PyTorch, without adapters: " in said
    assert "of a full step's FLOPs" in said
    assert "full fine-tuning's" not in said


@pytest.mark.slow
def test_inspect_and_export_see_the_adapters_of_a_run(
    finished: tuple[Path, Summary, str], tmp_path: Path
) -> None:
    output = finished[0]
    assert (output / "report.html").is_file()
    last = selections_of(output)[-1]
    inspection = inspect_run(output)
    assert inspection.selection.trained == frozenset(last["trained"])
    assert f"{last['step_flops'] / last['whole_flops']:.1%} of full fine-tuning's FLOPs" in str(
        inspection.selection
    )
    known = tmp_path / "selections.json"  # the policy measured none
    known.write_text(json.dumps([{**last, "importance": dict.fromkeys(last["trained"], 1.0)}]))
    again = inspect_run(output, PlanOptions(importances=known))
    assert again.selection.budget_flops <= last["budget_flops"]
    model, _ = _model_and_batch(str(output), read_run(output), BatchShape())
    state = model.state_dict()
    for name, tensor in adapter_of(output).items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)


def test_full_fine_tuning_beside_it_has_no_adapters_and_a_tenth_of_the_rate(settings: Settings) -> None:
    given = {"model": "demo", "dataset": "demo"}
    adapted = settings_from({**given, "lora": 8, "lora_alpha": 8, "target_modules": "q_proj"})
    assert full_run_beside(adapted) == settings_from({**given, "policy": "full"})


@pytest.mark.long
def test_the_comparison_with_full_fine_tuning_says_the_rates(settings: Settings, tmp_path: Path) -> None:
    stream = StringIO()
    short = replace(settings, epochs=1, policy="last_layers")
    own, full = compare_with_full(short, tmp_path / "run", reporter(stream))
    assert full.counted_flops == own.full_flops == full.full_flops
    assert "has a learning rate of 0.001: adapters get 10 times as much" in stream.getvalue()


def test_defaults_follow_from_adapters_unless_they_are_given() -> None:
    given: dict[str, Any] = {"model": "demo", "dataset": "demo", "lora": 16}
    chosen = settings_from(given)
    assert (chosen.lr, chosen.budget_of) == (2e-4, "full_finetuning")
    own = settings_from({**given, "learning_rate": 1e-3, "budget_of": "step"})
    assert (own.lr, own.budget_of) == (1e-3, "step")
    without = settings_from({**given, "lora": None})
    assert (without.lr, without.budget_of) == (2e-5, "step")
    assert settings_from(chosen.as_dict()) == chosen


def test_a_run_from_before_there_were_adapters_is_continued(settings: Settings) -> None:
    plain = Settings(model=settings.model, dataset=settings.dataset)
    older = {name: value for name, value in plain.as_dict().items() if "lora" not in name}
    assert plain.differences(older) == []
    assert replace(plain, lora=4).differences(older) == ["--lora was None and is now 4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": 0}, "--lora: expected at least 1, got 0"),
        ({"lora": 4, "lora_alpha": 0}, "--lora-alpha: expected at least 1, got 0"),
        ({"lora_alpha": 8}, "--lora-alpha 8 needs adapters: give their rank, such as --lora 16"),
        ({"target_modules": "q_proj"}, "--target-modules q_proj needs adapters"),
        ({"lora": 4, "target_modules": " , "}, "--target-modules: expected names of linear layers"),
        ({"lora": 4, "target_modules": "all-linear,q_proj"}, "or all-linear alone, got 'all-linear,q_proj'"),
        ({"lora": 4, "budget_of": "base"}, "--budget-of: expected one of step, full_finetuning, got 'base'"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(model="demo", dataset="demo", **change)


def test_layers_that_the_model_does_not_have_are_refused_with_those_it_has(
    settings: Settings, tmp_path: Path
) -> None:
    other = replace(settings, target_modules="q_proj,query")
    with pytest.raises(
        ValueError, match=r"no linear layers called query; it has, beside the head, down_proj, .*, v_proj"
    ):
        finetune(other, tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()


def test_a_missing_peft_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    options = {"model": "demo", "dataset": "demo", "lora": 16}
    places: dict[str, Any] = dict.fromkeys(("config", "output", "resume"))
    with pytest.raises(ImportError, match=r'LoRA needs peft: pip install "gtcompile\[lora\]"'):
        given_settings(options, (), dry_run=True, **places)
    assert given_settings({**options, "lora": None}, (), dry_run=True, **places).lora is None


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=260))


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "layers"), [(lambda: tiny_llama(4), 4 * 7), (gpt2, 2 * 4), (t5, 2 * 6 + 2 * 10)]
)
def test_all_linear_layers_but_the_head_get_adapters_of_any_architecture(make: Any, layers: int) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = adapters.add_lora(model, 2)
    assert adapters.adapted_layers(adapted) == layers
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
