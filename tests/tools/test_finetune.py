"""Runs of `finetune` from settings to files: exact counts, nothing hidden in a step, stop and resume."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

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
    set_seed,
)

from gtcompile import BudgetError, GTCompileError
from gtcompile.tools.finetune import loop
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.run import compare_with_full, finetune
from gtcompile.tools.finetune.summary import Summary, comparison, notes, summary_from
from gtcompile.tools.models.loading import load_language_model
from gtcompile.tools.runs.preparation import Prepared, prepare
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import Settings

EPOCHS, STEPS_PER_EPOCH = 2, 4


def reporter() -> Reporter:
    return Reporter(Console(file=StringIO(), width=200))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run of a tiny OPT with dropout, on a file of 20 records (18 of them to learn from)."""
    folder = tmp_path_factory.mktemp("inputs")
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
    OPTForCausalLM(config).save_pretrained(folder / "model")
    records = [{"source": f"the number is {n}.", "target": f"it is {n}"} for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Settings(
        model=str(folder / "model"),
        dataset=str(folder / "data.jsonl"),
        epochs=EPOCHS,
        batch_size=5,
        lr=1e-2,
        max_length=48,
        max_new_tokens=8,
        budget=0.6,
    )


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """An uninterrupted run and its folder."""
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, finetune(settings, output, reporter())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(path)]


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(output / "checkpoint.pt", weights_only=True)["model"]
    return state


def assert_same_run(output: Path, expected: Path) -> None:
    own, other = final_weights(output), final_weights(expected)
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name], other[name])] == []
    assert without_seconds(output / "metrics.jsonl") == without_seconds(expected / "metrics.jsonl")
    assert (output / "selections.json").read_text() == (expected / "selections.json").read_text()


def test_predicted_flops_equal_counted_flops_and_keep_the_budget(finished: tuple[Path, Summary]) -> None:
    _, summary = finished
    assert summary.predicted_flops == summary.counted_flops
    assert 0.36 * summary.full_flops < summary.predicted_flops <= 0.6 * summary.full_flops
    assert summary.comparison is not None
    assert summary.comparison.full_flops * summary.steps == summary.full_flops


def test_every_step_and_every_selection_is_written(finished: tuple[Path, Summary]) -> None:
    output, summary = finished
    metrics = lines(output / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert sum(line["flops"] for line in metrics) == summary.predicted_flops
    selections = json.loads((output / "selections.json").read_text())
    assert [entry["epoch"] for entry in selections] == [0, 1]
    assert all(entry["step_flops"] == entry["counted_step_flops"] for entry in selections)


def test_the_model_is_written_with_its_tokenizer_and_can_generate(finished: tuple[Path, Summary]) -> None:
    output, _ = finished
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert model.config.use_cache
    saved = final_weights(output)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.decode(tokenizer("abc", add_special_tokens=False)["input_ids"]) == "abc"


def test_only_selected_parameters_moved(finished: tuple[Path, Summary], settings: Settings) -> None:
    output, _ = finished
    before = AutoModelForCausalLM.from_pretrained(settings.model).state_dict()
    after = final_weights(output)
    selections = json.loads((output / "selections.json").read_text())
    trained = {fqn for entry in selections for fqn in entry["trained"]}
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


def plain_fine_tuning(prepared: Prepared) -> dict[str, torch.Tensor]:
    """Full fine-tuning in a dozen lines of PyTorch: the oracle."""
    settings, model = prepared.settings, prepared.language.model
    set_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    total = settings.epochs * prepared.steps_per_epoch
    step = 0
    for epoch in range(settings.epochs):
        for indices in prepared.epoch(epoch):
            optimizer.param_groups[0]["lr"] = settings.lr * (total - step) / total
            model(**prepared.batch(indices)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model.state_dict()  # type: ignore[no-any-return]


def test_a_full_run_is_bit_equal_to_a_plain_loop(settings: Settings, tmp_path: Path) -> None:
    full = replace(settings, method="full")
    finetune(full, tmp_path / "run", reporter())
    expected = plain_fine_tuning(prepare(full))
    actual = final_weights(tmp_path / "run")
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def at_step(number: int, action: Callable[[], None]) -> Callable[..., float]:
    """`forward_and_backward` that does something in the given step, after the backward."""
    original, steps = loop.forward_and_backward, iter(range(1, 1000))

    def patched(*arguments: Any) -> float:
        loss = original(*arguments)
        if next(steps) == number:
            action()
        return loss

    return patched


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "action"),
    [
        (2, press_ctrl_c),
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
        patch.setattr(loop, "forward_and_backward", at_step(step, action))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, output, reporter())
    torch.rand(7)  # another process would not have this random state either
    summary = finetune(settings, output, reporter(), resume=True)
    assert_same_run(output, expected)
    assert summary.predicted_flops == finished[1].predicted_flops


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
    run = replace(settings, dataset=str(data), method="full", max_eval_samples=1)
    digest = prepare(run, weights=False).digest
    write_run(tmp_path / "run", run, digest)
    data.write_text(data.read_text().replace("number is 3", "number is 4"))
    assert prepare(run, weights=False).digest != digest
    with pytest.raises(ValueError, match="began with other examples"):
        finetune(run, tmp_path / "run", reporter(), resume=True)


def write_run(folder: Path, run: Settings, digest: str) -> None:
    """A folder in which a run began, as far as `resume` looks before it loads a checkpoint."""
    with closing(RunFolder(folder)) as begun:
        begun.write_settings(run, {"examples": digest})


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


def test_a_checkpoint_of_another_model_is_refused(
    finished: tuple[Path, Summary], settings: Settings, tmp_path: Path
) -> None:
    state = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    state["model"].popitem()
    torch.save(state, tmp_path / "checkpoint.pt")
    (tmp_path / "run.json").write_text((finished[0] / "run.json").read_text())
    with pytest.raises(ValueError, match="checkpoint of another model"):
        finetune(settings, tmp_path, reporter(), resume=True)


def test_a_budget_below_the_minimum_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small"):
        finetune(replace(settings, budget=0.1), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "forward_and_backward", lambda *_: float("nan"))
    with pytest.raises(GTCompileError, match=r"loss became nan in step 0.*--lr"):
        finetune(replace(settings, method="full"), tmp_path / "run", reporter())


def test_a_prediction_that_is_not_exact_stops_the_run_before_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtcompile.tools.common.flop_meter.count_step_flops", lambda *_: 1)
    with pytest.raises(GTCompileError, match=r"executes 1 FLOPs where \d+ were predicted"):
        finetune(replace(settings, method="full"), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()


def test_products_that_cannot_be_counted_are_named_as_the_reason(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtcompile.tools.common.flop_meter.count_step_flops", lambda *_: 1)
    with (
        torch._inductor.config.patch(max_autotune=True),
        pytest.raises(GTCompileError, match=r"only 1 were counted.*switch off max_autotune"),
    ):
        finetune(replace(settings, method="full"), tmp_path / "run", reporter())


def test_what_is_recomputed_to_save_memory_is_counted_and_said(settings: Settings, tmp_path: Path) -> None:
    frugal = replace(settings, activation_memory_budget=0.2, epochs=1)
    summary = finetune(frugal, tmp_path / "run", reporter())
    assert summary.counted_flops > summary.predicted_flops
    assert "recomputed to save memory" in " ".join(notes([summary]))


def test_the_comparison_runs_full_fine_tuning_from_the_same_start(settings: Settings, tmp_path: Path) -> None:
    short = replace(settings, epochs=1, max_train_samples=10, method="last-layers")
    run, full = compare_with_full(short, tmp_path / "run", reporter())
    assert full.counted_flops == run.full_flops == full.full_flops
    assert run.quality_before is not None
    first = [
        lines(folder / "metrics.jsonl")[0]["loss"] for folder in (tmp_path / "run", tmp_path / "run" / "full")
    ]
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
        ({"method": "best"}, "--method: expected one of adaptive, full, last-layers"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(model="demo", dataset="demo", **change)


def test_a_prompt_must_have_room_beside_the_answer(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"no room for a prompt.*64 positions"):
        prepare(replace(settings, max_new_tokens=40))


def test_one_batch_is_not_enough_to_choose_what_to_train(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"make one batch of 5.*--batch-size"):
        prepare(replace(settings, max_train_samples=5))
