"""Runs of `finetune` from settings to files: exact counts, nothing hidden in a step, stop and resume."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Seq2SeqTrainingArguments,
    Trainer,
)

from gtcompile import BudgetError, GTCompileError
from gtcompile.selection.policies import NAMES
from gtcompile.tools.finetune.recorder import Recorder
from gtcompile.tools.finetune.run import compare_with_full, finetune, plan
from gtcompile.tools.finetune.summary import Summary, comparison, notes, summary_from
from gtcompile.tools.finetune.trainer_options import training_arguments
from gtcompile.tools.inspect.command import inspect_run
from gtcompile.tools.models.loading import load_language_model
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.settings import Policy, Settings, read_config, settings_from
from gtcompile.tools.runs.training_arguments import DECIDED, known_arguments, parse_assignment
from tests.support.finetune import assert_same_weights, final_weights, reporter, short_run, steps_of

EPOCHS, STEPS_PER_EPOCH = 2, 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run of a tiny OPT with dropout, on a file of 20 records (18 of them to learn from)."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=260,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=3,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("inputs")
    return short_run(folder, OPTForCausalLM(config), epochs=EPOCHS, batch_size=5, budget=0.6)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """An uninterrupted run and its folder."""
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, finetune(settings, output, reporter())


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "passes")} for record in records]


def selections(output: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads((output / "selections.json").read_text())
    return made


def assert_same_run(output: Path, expected: Path) -> None:
    assert_same_weights(output, expected)
    metrics = [without_seconds(steps_of(folder)) for folder in (output, expected)]
    assert metrics[0] == metrics[1]
    assert without_seconds(selections(output)) == without_seconds(selections(expected))


def test_predicted_flops_equal_counted_flops_and_keep_the_budget(finished: tuple[Path, Summary]) -> None:
    _, summary = finished
    assert summary.predicted_flops == summary.counted_flops
    assert 0.36 * summary.full_flops < summary.predicted_flops <= 0.6 * summary.full_flops
    assert summary.comparison is not None
    assert summary.comparison.full_flops * summary.steps == summary.full_flops


def test_every_step_and_every_selection_is_written(finished: tuple[Path, Summary]) -> None:
    output, summary = finished
    metrics = steps_of(output)
    assert [line["step"] for line in metrics] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert sum(line["flops"] for line in metrics) == summary.predicted_flops
    assert [entry["epoch"] for entry in selections(output)] == [0, 1]
    assert all(entry["step_flops"] == entry["counted_step_flops"] for entry in selections(output))


def test_the_model_is_written_with_its_tokenizer_and_can_generate(finished: tuple[Path, Summary]) -> None:
    output, _ = finished
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert model.config.use_cache
    last = AutoModelForCausalLM.from_pretrained(
        output / f"checkpoint-{EPOCHS * STEPS_PER_EPOCH}"
    ).state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.decode(tokenizer("abc", add_special_tokens=False)["input_ids"]) == "abc"


def test_only_selected_parameters_moved(finished: tuple[Path, Summary], settings: Settings) -> None:
    output, _ = finished
    before = AutoModelForCausalLM.from_pretrained(settings.model).state_dict()
    after = final_weights(output)
    trained = {fqn for entry in selections(output) for fqn in entry["trained"]}
    moved = {fqn for fqn in before if not torch.equal(before[fqn], after[fqn])} - {"lm_head.weight"}
    assert moved <= trained
    assert moved


def test_the_summary_reads_back_and_prints_beside_full_fine_tuning(finished: tuple[Path, Summary]) -> None:
    output, summary = finished
    assert summary_from(json.loads((output / "summary.json").read_text())) == summary
    stream = StringIO()
    console = Console(file=stream, width=120)
    console.print(comparison(summary))
    assert f"{summary.full_flops:.4e}" in stream.getvalue()
    assert "not run" in stream.getvalue()
    assert all(notes([summary]))


@pytest.mark.slow
def test_a_full_run_is_bit_equal_to_a_trainer_without_gtcompile(settings: Settings, tmp_path: Path) -> None:
    full = replace(settings, policy="full")
    finetune(full, tmp_path / "run", reporter())
    prepared = prepare(full)
    arguments = training_arguments(full, tmp_path / "plain")
    model, data = prepared.language.model, prepared.examples
    Trainer(model=model, args=arguments, data_collator=prepared.collate, train_dataset=data).train()  # type: ignore[arg-type]
    expected, actual = model.state_dict(), final_weights(tmp_path / "run")
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def at_step(number: int, action: Callable[[], None]) -> Callable[..., None]:
    """`Recorder.passed` that does something in the given step, after the backward."""
    original, steps = Recorder.passed, iter(range(1, 1000))

    def patched(*arguments: Any) -> None:
        original(*arguments)
        if next(steps) == number:
            action()

    return patched


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "action"),
    [
        (2, press_ctrl_c),
        (1, die),
        pytest.param(STEPS_PER_EPOCH, press_ctrl_c, marks=pytest.mark.long),
        pytest.param(7, die, marks=pytest.mark.long),
    ],
)
def test_a_run_stopped_at_any_step_continues_bit_equal(
    step: int,
    action: Callable[[], None],
    settings: Settings,
    finished: tuple[Path, Summary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, expected = tmp_path / "run", finished[0]
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "passed", at_step(step, action))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, output, reporter())
    (output / f"checkpoint-{step + 1}").mkdir()  # a kill leaves a part of the next checkpoint
    (output / f"checkpoint-{step + 1}" / "model.safetensors").write_bytes(b"half of")
    torch.rand(7)  # another process would not have this random state either
    summary = finetune(settings, output, reporter(), resume=True)
    assert_same_run(output, expected)
    assert summary.predicted_flops == finished[1].predicted_flops


@pytest.mark.slow
def test_a_finished_run_goes_on_for_more_epochs(
    finished: tuple[Path, Summary], settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    longer = replace(settings, epochs=EPOCHS + 1)
    summary = finetune(longer, tmp_path / "run", reporter(), resume=True)
    assert summary.steps == (EPOCHS + 1) * STEPS_PER_EPOCH
    assert [entry["epoch"] for entry in selections(tmp_path / "run")] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["epochs"] == EPOCHS + 1
    done = finished[1].steps
    metrics = [without_seconds(steps_of(folder))[:done] for folder in (tmp_path / "run", finished[0])]
    assert metrics[0] == metrics[1]
    with pytest.raises(ValueError, match="--epochs was 3 and is now 2"):
        finetune(settings, tmp_path / "run", reporter(), resume=True)


def test_a_schedule_of_steps_cannot_be_extended(settings: Settings) -> None:
    progressive = replace(settings, policy="progressive")
    longer = replace(progressive, epochs=EPOCHS + 1)
    assert longer.differences(progressive.as_dict()) == [f"--epochs was {EPOCHS} and is now {EPOCHS + 1}"]
    assert replace(settings, epochs=EPOCHS + 1).differences(settings.as_dict()) == []


def test_a_plan_makes_the_first_selection_and_writes_nothing(
    finished: tuple[Path, Summary], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = StringIO()
    plan(settings, reporter(stream))
    first = selections(finished[0])[0]
    assert f"training {len(first['trained'])} of {first['selectable']} parameters" in stream.getvalue()
    assert f"a step: {first['step_flops']:.4e} FLOPs" in stream.getvalue()
    assert f"a full step of plain PyTorch: {first['full_flops']:.4e} FLOPs" in stream.getvalue()
    assert f"the run: {EPOCHS * STEPS_PER_EPOCH} steps" in stream.getvalue()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["rotating", "progressive"])
def test_a_policy_that_changes_the_set_by_the_step_is_counted_step_by_step(
    settings: Settings, tmp_path: Path, policy: Any
) -> None:
    summary = finetune(replace(settings, policy=policy, epochs=1), tmp_path / "run", reporter())
    flops = [line["flops"] for line in steps_of(tmp_path / "run")]
    assert len(set(flops)) > 1
    assert sum(flops) == summary.predicted_flops == summary.counted_flops <= 0.6 * summary.full_flops
    assert "proven" not in str(inspect_run(tmp_path / "run").selection)


@pytest.mark.slow
def test_what_the_trainer_can_do_is_reached_by_its_arguments_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = {
        "gradient_accumulation_steps": 3,
        "warmup_steps": 1,
        "bf16": True,
        "eval_strategy": "epoch",
        "logging_steps": 1,
        "report_to": "tensorboard",
    }
    stream = StringIO()
    run = replace(settings, epochs=1, args=arguments)
    summary = finetune(run, tmp_path / "run", reporter(stream))
    metrics = steps_of(tmp_path / "run")
    step_flops = selections(tmp_path / "run")[0]["step_flops"]
    assert [line["flops"] // step_flops for line in metrics] == [3, 1]
    assert summary.predicted_flops == summary.counted_flops == STEPS_PER_EPOCH * step_flops
    assert [line["lr"] for line in metrics] == [0.0, settings.lr]
    assert "step 2: eval_loss" in stream.getvalue()
    trace = events.EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent))
    trace.Reload()
    losses = {event.step: event.value for event in trace.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in metrics}, rel=1e-3)
    assert len(trace.Scalars("train/adaptive/flops_fraction")) == 1


@pytest.mark.slow
def test_a_run_killed_while_it_was_evaluated_is_evaluated_and_not_trained_again(
    finished: tuple[Path, Summary], settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    summary = finetune(settings, tmp_path / "run", reporter(), resume=True)
    assert_same_run(tmp_path / "run", finished[0])
    assert (summary.quality, summary.steps) == (finished[1].quality, finished[1].steps)
    assert summary.comparison is not None


def test_a_finished_run_is_not_run_again(finished: tuple[Path, Summary], settings: Settings) -> None:
    output, summary = finished
    assert finetune(settings, output, reporter(), resume=True) == summary


def test_a_folder_that_is_not_empty_is_refused_and_kept(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"not empty.*--resume"):
        finetune(settings, tmp_path, reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_run_is_not_continued_with_other_settings(
    finished: tuple[Path, Summary], settings: Settings
) -> None:
    with pytest.raises(ValueError, match=r"--lr was 0\.01 and is now 0\.5"):
        finetune(replace(settings, lr=0.5), finished[0], reporter(), resume=True)


def test_a_run_is_not_continued_when_its_data_has_changed(settings: Settings, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(Path(settings.dataset).read_text())
    run = replace(settings, dataset=str(data), policy="full", max_eval_samples=1)
    digest = prepare(run, weights=False).digest
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run.as_dict(), "examples": digest}))
    data.write_text(data.read_text().replace("number is 3", "number is 4"))
    assert prepare(run, weights=False).digest != digest
    with pytest.raises(ValueError, match="began with other examples"):
        finetune(run, tmp_path / "run", reporter(), resume=True)


def test_weights_that_the_checkpoint_lacks_are_told(settings: Settings, tmp_path: Path) -> None:
    model = OPTForCausalLM.from_pretrained(settings.model)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("layers.1.fc1.weight")}
    model.save_pretrained(tmp_path / "lacking", state_dict=weights)
    lacking = load_language_model(str(tmp_path / "lacking"))
    assert lacking.random_weights == ("model.decoder.layers.1.fc1.weight",)
    assert load_language_model(settings.model).random_weights == ()


def test_weights_of_other_shapes_and_broken_files_are_refused_by_name(
    settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(settings.model, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "ffn_dim": 48}))
    with pytest.raises(ValueError, match=r"fc1.* is \[32.* in the file and \[48.* by config.json"):
        load_language_model(str(tmp_path / "own"))
    weights = next((tmp_path / "own").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"could not load the model of .*own"):
        load_language_model(str(tmp_path / "own"))


def test_an_answer_longer_than_an_encoder_decoders_positions_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 260}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 24}
    BartForConditionalGeneration(BartConfig(**sizes, **heads, **widths)).save_pretrained(tmp_path / "bart")
    run = replace(settings, model=str(tmp_path / "bart"), max_new_tokens=32)
    with pytest.raises(ValueError, match="32 tokens is longer than the model's 24 positions"):
        prepare(run)
    assert prepare(replace(run, max_new_tokens=24)).collate.target_length <= 24


def test_there_is_nothing_to_resume_in_an_empty_folder(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        finetune(settings, tmp_path, reporter(), resume=True)


@pytest.mark.parametrize("change", [{"ffn_dim": 48}, {"num_hidden_layers": 2}])
def test_a_checkpoint_of_another_model_is_refused(
    change: dict[str, int], finished: tuple[Path, Summary], settings: Settings, tmp_path: Path
) -> None:
    config = OPTConfig.from_pretrained(settings.model, **change)
    OPTForCausalLM(config).save_pretrained(tmp_path / "other")
    run = replace(settings, model=str(tmp_path / "other"), epochs=EPOCHS + 1)
    shutil.copytree(finished[0], tmp_path / "run")
    saved = json.loads((finished[0] / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**saved, "model": run.model}))
    with pytest.raises(ValueError, match="of another model"):
        finetune(run, tmp_path / "run", reporter(), resume=True)


def test_a_budget_below_the_minimum_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small"):
        finetune(replace(settings, budget=0.1), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "training_step", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(GTCompileError, match=r"loss became nan in step 1.*--lr"):
        finetune(replace(settings, policy="full"), tmp_path / "run", reporter())


def test_a_prediction_that_is_not_exact_stops_the_run_before_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtcompile.tools.common.flop_meter.count_step_flops", lambda *_: 1)
    with pytest.raises(GTCompileError, match=r"executes 1 FLOPs where \d+ were predicted"):
        finetune(replace(settings, policy="full"), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()


def test_products_that_cannot_be_counted_are_named_as_the_reason(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtcompile.tools.common.flop_meter.count_step_flops", lambda *_: 1)
    with (
        torch._inductor.config.patch(max_autotune=True),
        pytest.raises(GTCompileError, match=r"only 1 were counted.*switch off max_autotune"),
    ):
        finetune(replace(settings, policy="full"), tmp_path / "run", reporter())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"activation_memory_budget": 0.2},
        pytest.param({"args": {"activation_checkpointing": True}}, marks=pytest.mark.long),
    ],
)
def test_what_is_recomputed_to_save_memory_is_counted_and_said(
    how: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    frugal = replace(settings, epochs=1, **how)
    summary = finetune(frugal, tmp_path / "run", reporter())
    assert summary.counted_flops > summary.predicted_flops
    assert "recomputed to save memory" in " ".join(notes([summary]))


@pytest.mark.slow
def test_the_comparison_runs_full_fine_tuning_from_the_same_start(settings: Settings, tmp_path: Path) -> None:
    short = replace(settings, epochs=1, max_train_samples=10, policy="last_layers")
    run, full = compare_with_full(short, tmp_path / "run", reporter())
    assert full.counted_flops == run.full_flops == full.full_flops
    assert run.quality_before is not None
    first = [steps_of(folder)[0]["loss"] for folder in (tmp_path / "run", tmp_path / "run" / "full")]
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": float("inf")}, "--lr: expected greater than 0 and finite, got inf"),
        ({"budget": 0.0}, r"--budget: expected in \(0, 1\], got 0.0"),
        ({"budget": float("nan")}, "--budget"),
        ({"activation_memory_budget": 1.5}, r"--activation-memory-budget: expected in \[0, 1\], got 1.5"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size"),
        ({"lr": 0.0}, "--lr"),
        ({"max_length": 3}, "--max-length"),
        ({"policy": "lora"}, "--policy: expected one of best, sampled, last_layers"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(model="demo", dataset="demo", **change)


def test_a_prompt_must_have_room_beside_the_answer(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"no room for a prompt.*64 positions"):
        prepare(replace(settings, max_new_tokens=40))


def test_a_selection_needs_four_examples(settings: Settings) -> None:
    with pytest.raises(ValueError, match="needs 4 training examples at least, the data has 3"):
        prepare(replace(settings, max_train_samples=3))


def test_every_policy_can_be_named() -> None:
    assert set(get_args(Policy)) == {*NAMES, "full"}


def test_the_arguments_known_without_importing_torch_are_those_of_transformers() -> None:
    fields = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert known_arguments().keys() < fields
    assert fields - known_arguments().keys() <= set(DECIDED)


def test_a_configuration_is_read_from_yaml_and_from_a_run(
    finished: tuple[Path, Summary], settings: Settings, tmp_path: Path
) -> None:
    assert settings_from(read_config(finished[0] / "run.json")) == settings
    config = tmp_path / "run.yaml"
    config.write_text("model: demo\ndataset: demo\nlearning_rate: 1e-3\nwarmup_steps: 10\nnum_beams: 2\n")
    given = dict(map(parse_assignment, ["bf16=true", "run_name=2024"]))
    read = settings_from({**read_config(config), "args": None, **given})
    args = {"warmup_steps": 10, "bf16": True, "run_name": "2024"}
    assert read == Settings(model="demo", dataset="demo", lr=1e-3, num_beams=2, compiler="auto", args=args)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1}, "'warmup' is neither an option.*near names: warmup_steps"),
        ({"bf16": "yes"}, "bf16: expected a value of type bool, got 'yes'"),
        ({"epochs": 1.5}, "epochs: expected a value of type int, got 1.5"),
        ({"adam_beta1": True}, "adam_beta1: expected a value of type float, got True"),
        ({"output_dir": "x"}, "'output_dir' is neither an option"),
        ({"model": None}, "model: expected a value of type str, got None"),
        ({"args": 3}, "args: expected names of TrainingArguments with their values, got 3"),
    ],
)
def test_settings_of_a_wrong_name_or_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_from({"model": "demo", "dataset": "demo", **values})


def test_values_that_transformers_refuses_are_refused_before_any_work(
    settings: Settings, tmp_path: Path
) -> None:
    for args in ({"optim": "none such"}, {"save_strategy": "sometimes"}):
        with pytest.raises(ValueError, match="is not a valid"):
            finetune(replace(settings, args=args), tmp_path / "run", reporter())
    with pytest.raises(ValueError, match="leave out fsdp and auto_find_batch_size"):
        finetune(replace(settings, args={"auto_find_batch_size": True}), tmp_path / "run", reporter())
    with pytest.raises(ImportError, match="report_to=paper: not installed"):
        finetune(replace(settings, args={"report_to": "paper"}), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()
