"""The comparison of methods: resumable at any moment, paired by seed, one data pipeline for all."""

import importlib.util
import json
import math
from itertools import islice

import pytest
from typer.testing import CliRunner

from gtcompile.cli import app
from gtcompile.tools.compare import command, run
from gtcompile.tools.compare.report import paired_interval, summarise
from gtcompile.tools.compare.text_batches import Batches, demo_data, read_scitldr
from gtcompile.tools.models.loading import load_language_model
from gtcompile.training import step_costs
from tests.support.known_costs import capture_costs_once

TINY = [
    "--dataset",
    "demo",
    "--length",
    "48",
    "--held-out",
    "8",
    "--float32",
    "--compiler",
    "none",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--evaluations",
    "1",
]
TINY += ["--measured", "2", "--selections", "1", "--save-every", "1", "--threads", "1", "--seeds", "0"]


@pytest.fixture(autouse=True)
def costs_captured_once(monkeypatch):
    capture_costs_once(monkeypatch, step_costs, run)


def compare(folder, *more):
    return CliRunner().invoke(app, ["compare", "demo", *TINY, "--output", str(folder), *more])


def tiny(folder, *more):
    result = compare(folder, *more)
    if isinstance(result.exception, EndedError):
        raise result.exception
    assert result.exit_code == 0, result.output
    rows = map(json.loads, (folder / "runs.jsonl").read_text("utf-8").splitlines())
    return {row["key"]: row for row in rows}


class EndedError(Exception):
    """Stands for the end of the process."""


@pytest.mark.long
def test_a_comparison_that_is_ended_at_every_step_has_the_results_of_one_that_is_not(tmp_path, monkeypatch):
    arms = ["--arms", "sampled", "--budgets", "0.7", "--purposes", "steps", "--steps", "3"]
    straight = tiny(tmp_path / "straight", *arms)
    advance, steps = run._Training.advance, []

    def ends_in_its_second_step(training):
        steps.append(1)
        if len(steps) == 2:
            raise EndedError
        advance(training)

    monkeypatch.setattr(run._Training, "advance", ends_in_its_second_step)
    for _ in range(5):
        steps.clear()
        try:
            broken = tiny(tmp_path / "broken", *arms)
            break
        except EndedError:
            continue
    assert broken.keys() == straight.keys()
    for key, row in straight.items():
        for name in ("loss", "flops", "measuring_flops", "train_losses"):
            assert broken[key][name] == row[name]
    for name in ("table.md", "loss_by_flops.svg", "loss_by_flops.png", "loss_by_seconds.svg"):
        assert (tmp_path / "broken" / name).stat().st_size > 100


@pytest.mark.slow
def test_finished_runs_are_kept_and_a_line_that_was_cut_off_is_run_again(tmp_path, monkeypatch):
    arms = ["--arms", "full,last_layers", "--purposes", "steps", "--steps", "1"]
    first = tiny(tmp_path, *arms)
    file = tmp_path / "runs.jsonl"
    lines = file.read_text("utf-8").splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:40], "utf-8")
    again = []
    monkeypatch.setattr(
        command, "run", lambda chosen, *rest: again.append(chosen.arm) or run.run(chosen, *rest)
    )
    second = tiny(tmp_path, *arms)
    assert again == ["last_layers"]
    assert {key: row["loss"] for key, row in second.items()} == {
        key: row["loss"] for key, row in first.items()
    }


def test_at_equal_flops_a_method_runs_for_more_steps_and_spends_what_full_fine_tuning_spends(tmp_path):
    rows = tiny(tmp_path, "--arms", "full,last_layers", "--budgets", "0.5", "--purposes", "flops")
    (full,) = (row for row in rows.values() if row["arm"] == "full")
    (longer,) = (row for row in rows.values() if row["arm"] == "last_layers")
    assert (full["steps"], longer["steps"]) == (2, 4)
    assert 0.9 * full["flops"] < longer["flops"] <= full["flops"]
    assert full["flops_fraction"] == 1.0


@pytest.mark.slow
def test_a_cached_prefix_and_labelled_logits_take_fewer_flops(tmp_path):
    shared = ["--arms", "last_layers,last_layers_cached", "--budgets", "0.5", "--purposes", "steps"]
    rows = tiny(tmp_path, *shared, "--texts", "4", "--steps", "8")
    plain, cached = rows.values()
    assert cached["flops"] < 0.8 * plain["flops"]


def test_other_data_in_the_same_folder_is_refused(tmp_path):
    tiny(tmp_path, "--arms", "full", "--purposes", "steps")
    result = compare(tmp_path, "--batch-size", "3")
    assert result.exit_code == 2
    assert "holds runs with other batch_size; choose another folder" in result.stderr


INSTALL = 'pip install "gtcompile[compare]"'


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        (["full"], "matplotlib", f"compare needs matplotlib: {INSTALL}; --no-plots needs no matplotlib"),
        (["lora"], "peft", f"compare needs peft: {INSTALL}"),
        (["full", "--no-plots"], "matplotlib", None),
        (["full"], "peft", None),
    ],
)
def test_a_missing_package_is_refused_if_it_is_needed(options, missing, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(command, "compare", lambda *_: None)
    result = compare(tmp_path, "--arms", *options)
    assert (result.exit_code, result.stderr) == ((0, "") if message is None else (2, f"error: {message}\n"))


@pytest.fixture(scope="module")
def batches():
    return Batches(load_language_model("demo", weights=False).tokenizer, size=2, length=40)


def test_every_method_sees_the_same_batches_and_another_seed_others(batches):
    def drawn(seed):
        return [b["input_ids"].tolist() for b in islice(batches.training(demo_data().train, seed), 40)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0)[:32] != drawn(0)[32:], "the second pass has the order of the first"


def test_fewer_texts_than_a_batch_holds_are_refused(batches):
    with pytest.raises(ValueError, match="--batch-size: expected at most 1, the texts to train on, got 2"):
        next(batches.training(demo_data().train[:1], 0))


def test_a_device_that_is_not_there_is_refused(tmp_path):
    result = compare(tmp_path / "new", "--device", "abacus")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --device: this machine has no torch device 'abacus'\n",
    )
    assert not (tmp_path / "new").exists()


def test_only_summaries_are_labelled_and_rows_have_one_length(batches):
    batch = batches.batch(demo_data().train[:2])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 40)}
    labelled = batch["labels"] >= 0
    assert (batch["labels"][labelled] == batch["input_ids"][labelled]).all()
    assert 0 < labelled.sum() < batch["attention_mask"].sum()


def test_scitldr_is_read_as_its_authors_publish_it(tmp_path):
    row = {"source": ["One.", "Two."], "target": ["Short.", "Other."]}
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "target": [name]}) + "\n", "utf-8")
    data = read_scitldr(tmp_path)
    assert (data.train[0].source, data.search[0].target, data.test[0].target) == ("One. Two.", "dev", "test")


def row(arm, seed, loss, purpose="steps"):
    shared = {"budget": None, "learning_rate": 1e-4, "steps": 10, "flops_fraction": 1.0}
    return {"arm": arm, "seed": seed, "loss": loss, "purpose": purpose, **shared}


def test_differences_are_paired_by_seed():
    rows = [row("full", 0, 2.0), row("full", 1, 3.0), row("lora", 1, 3.2), row("lora", 0, 2.1)]
    full, lora = summarise(rows)
    assert (full.name, full.difference, full.interval) == ("full", None, None)
    assert lora.difference == pytest.approx(0.15)
    # Student's t of one degree of freedom at 97.5 % is 12.706; the error of the mean is 0.05.
    assert lora.interval == pytest.approx(12.706 * 0.05, rel=1e-3)


def test_one_seed_has_no_interval():
    assert paired_interval([0.1]) is None
    assert summarise([row("full", 0, 2.0), row("lora", 0, 2.5)])[1].interval is None
    assert math.isfinite(paired_interval([0.1, 0.2]))
