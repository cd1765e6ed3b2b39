"""Runs of `finetune` with the prefix cache and labelled logits: the same training, counted as it ran."""

import json
import os
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from gtcompile import GTCompileError
from gtcompile.tools.finetune.recorder import Recorder
from gtcompile.tools.finetune.run import compare_with_full, finetune, plan
from gtcompile.tools.finetune.summary import Summary, notes
from gtcompile.tools.runs.run_record import read_run
from gtcompile.tools.runs.settings import Settings
from tests.support.finetune import assert_same_weights, reporter, short_run, steps_of, tiny_llama

EPOCHS, STEPS_PER_EPOCH = 4, 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run of a tiny Llama, which has no dropout, on 18 records."""
    options = {
        "tokenizer": "bytes",
        "policy": "last_layers",
        "epochs": EPOCHS,
        "batch_size": 6,
        "budget": 0.5,
    }
    return short_run(tmp_path_factory.mktemp("inputs"), tiny_llama(5), **options)


@pytest.fixture(scope="module")
def plain(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A run without savings and its folder."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, finetune(settings, folder, reporter())


@pytest.mark.slow
def test_with_the_prefix_cache_a_run_is_the_same_bit_for_bit_and_counted_as_it_ran(
    settings: Settings, plain: tuple[Path, Summary], tmp_path: Path
) -> None:
    folder, expected = plain
    summary = finetune(replace(settings, prefix_cache="memory"), tmp_path / "run", reporter())
    assert_same_weights(tmp_path / "run", folder)
    own, other = steps_of(tmp_path / "run"), steps_of(folder)
    assert [step["loss"] for step in own] == [step["loss"] for step in other]
    # the first epoch stores, and the first step of the second compares
    assert [step["cached"] for step in own] == [0] * 4 + [1] * 8
    cached = json.loads((tmp_path / "run" / "selections.json").read_text())[0]["cached_step_flops"]
    assert [step["flops"] for step in own] == [other[0]["flops"]] * 4 + [cached] * 8
    assert summary.predicted_flops == summary.counted_flops < expected.predicted_flops
    assert summary.full_flops == expected.full_flops
    assert "8 forwards started from the prefix cache" in " ".join(notes([summary]))


@pytest.mark.slow
def test_with_both_the_loss_is_the_same_and_the_share_is_of_a_plain_full_step(
    settings: Settings, plain: tuple[Path, Summary], tmp_path: Path
) -> None:
    folder, expected = plain
    both = replace(settings, prefix_cache=str(tmp_path / "prefix"), labelled_logits=True)
    summary, full = compare_with_full(both, tmp_path / "run", reporter())
    assert summary.predicted_flops == summary.counted_flops < 0.75 * expected.predicted_flops
    assert summary.full_flops == expected.full_flops == full.predicted_flops == full.counted_flops
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(steps_of(folder)[0]["loss"], rel=1e-5)
    assert summary.batch == "6 x 40 tokens, logits at 48 of them"
    assert list((tmp_path / "prefix").rglob("*.safetensors"))
    assert summary.title == "last_layers, budget 0.5, labelled logits, prefix cache"
    assert (tmp_path / "run" / "report.html").is_file()
    assert read_run(tmp_path / "run").batch()["labelled_positions"].shape == (48,)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_run_with_both_that_ctrl_c_stopped_continues_bit_equal(
    where: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(*arguments: Any) -> None:
        passed(*arguments)
        if len(steps_of(tmp_path / "run")) == 4 if (tmp_path / "run" / "metrics.jsonl").is_file() else False:
            os.kill(os.getpid(), signal.SIGINT)

    cache = str(tmp_path / "prefix") if where == "folder" else where
    both, passed = replace(settings, prefix_cache=cache, labelled_logits=True), Recorder.passed
    finetune(replace(both, prefix_cache="memory"), tmp_path / "whole", reporter())
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "passed", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            finetune(both, tmp_path / "run", reporter())
    assert len(steps_of(tmp_path / "run")) == 5
    summary = finetune(both, tmp_path / "run", reporter(), resume=True)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    losses = [[step["loss"] for step in steps_of(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert summary.predicted_flops == summary.counted_flops


def test_a_plan_tells_what_a_cached_step_costs(settings: Settings) -> None:
    stream = StringIO()
    plan(replace(settings, prefix_cache="memory", labelled_logits=True), reporter(stream))
    assert "a step that starts from the prefix cache: " in stream.getvalue()
    assert "6 x 40 tokens, logits at 48 of them" in stream.getvalue()


def test_another_place_of_the_cache_is_no_other_run_and_labelled_logits_are(settings: Settings) -> None:
    saved = settings.as_dict()
    assert replace(settings, prefix_cache="memory").differences(saved) == []
    assert replace(settings, labelled_logits=True).differences(saved) == [
        "--labelled-logits was False and is now True"
    ]


def test_labelled_logits_of_an_encoder_decoder_are_refused_and_nothing_is_written(
    settings: Settings, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=260, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        decoder_start_token_id=2,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    other = replace(settings, model=str(tmp_path / "model"), labelled_logits=True)
    with pytest.raises(GTCompileError, match="expected a causal language model"):
        finetune(other, tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()
