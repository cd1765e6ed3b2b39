"""The comparison of methods: resumable at any moment, paired by seed, one data pipeline for all."""

import importlib.util
import json
import math
from itertools import islice

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from gtcompile.cli import app
from gtcompile.tools.compare import command, plan, run, scores, setting
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.datasets import FILES, find_data, read_data
from gtcompile.tools.compare.options import CompareOptions
from gtcompile.tools.compare.plan import Speed, remembered_speed
from gtcompile.tools.compare.records import Records
from gtcompile.tools.compare.report import paired_interval, summarise, tables_of, values_of
from gtcompile.tools.compare.run import Run
from gtcompile.tools.compare.setting import Costs
from gtcompile.tools.compare.text_batches import Batches
from gtcompile.tools.data.formats import FORMATS, PIQA_SOLUTIONS, Example
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
TINY += ["--answer-length", "16"]


@pytest.fixture(autouse=True)
def costs_captured_once(monkeypatch):
    capture_costs_once(monkeypatch, step_costs, setting)


@pytest.fixture(autouse=True)
def measured_speed(monkeypatch):
    """The speed is measured in one test alone, since it takes two steps."""
    speed = Speed(flops_per_second=1e9, starting_seconds=1, scoring_seconds=1, origin="as given")
    monkeypatch.setattr(command, "measured_speed", lambda *_: speed)
    return plan.measured_speed


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
    advance, steps = run.Training.advance, []

    def ends_in_its_second_step(training):
        steps.append(1)
        if len(steps) == 2:
            raise EndedError
        advance(training)

    monkeypatch.setattr(run.Training, "advance", ends_in_its_second_step)
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
    arms = ["--arms", "full,last_layers", "--budgets", "0.5", "--purposes", "flops"]
    before = compare(tmp_path, *arms, "--dry-run").output
    rows = tiny(tmp_path, *arms)
    (full,) = (row for row in rows.values() if row["arm"] == "full")
    (longer,) = (row for row in rows.values() if (row["arm"], row["purpose"]) == ("last_layers", "flops"))
    assert (full["steps"], longer["steps"]) == (2, 4)
    assert 0.9 * full["flops"] < longer["flops"] <= full["flops"]
    assert full["flops_fraction"] == 1.0
    predicted = float(before.partition(" FLOPs of training steps")[0].rpartition(" ")[2])
    assert 0.95 * predicted < sum(row["flops"] for row in rows.values()) <= 1.005 * predicted
    assert "0 runs to do (3 are finished)" in compare(tmp_path, *arms, "--dry-run").output


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
    tokenizer = load_language_model("demo", weights=False).tokenizer
    return Batches(tokenizer, FORMATS["demo"], size=2, length=40, answer_length=16)


@pytest.fixture(scope="module")
def data():
    return read_data(*find_data("demo", None))


def test_every_method_sees_the_same_batches_and_another_seed_others(batches, data):
    def drawn(seed):
        return [b["input_ids"].tolist() for b in islice(batches.training(data.train[:64], seed), 40)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0)[:32] != drawn(0)[32:], "the second pass has the order of the first"


def test_fewer_texts_than_a_batch_holds_are_refused(batches, data):
    with pytest.raises(ValueError, match="--batch-size: expected at most 1, the texts to train on, got 2"):
        next(batches.training(data.train[:1], 0))


def test_a_device_that_is_not_there_is_refused(tmp_path):
    result = compare(tmp_path / "new", "--device", "abacus")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --device: this machine has no torch device 'abacus'\n",
    )
    assert not (tmp_path / "new").exists()


def test_only_summaries_are_labelled_and_rows_have_one_length(batches, data):
    batch = batches.batch(data.train[:2])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 40)}
    labelled = batch["labels"] >= 0
    assert (batch["labels"][labelled] == batch["input_ids"][labelled]).all()
    assert 0 < labelled.sum() < batch["attention_mask"].sum()


@pytest.fixture
def write(tmp_path):
    """Writes a record to the file of each split."""

    def write(record, *names):
        for name in names:
            (tmp_path / name).write_text(json.dumps(record) + "\n", "utf-8")
        return tmp_path

    return write


def test_scitldr_is_read_as_its_authors_publish_it(write):
    record = {"source": ["One.", "Two."], "target": ["Short.", "Other."]}
    data = read_data(*find_data("scitldr", write(record, "train.jsonl", "dev.jsonl", "test.jsonl")))
    assert data.train == data.search == data.test == (Example("One. Two.", ("Short.", "Other.")),)


def test_dialogsum_without_a_train_split_is_trained_on_a_share_of_dev_and_says_so(tmp_path):
    record = {"dialogue": "Hi", "summary1": "a", "summary2": "b", "summary3": "c"}
    for name in ("dev", "test"):
        lines = [json.dumps({**record, "dialogue": f"{name} {number}"}) for number in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    data = read_data(*find_data("dialogsum", tmp_path))
    assert [text.source for text in data.train] == [f"dev {number}" for number in range(8)]
    assert [text.source for text in data.search] == ["dev 8", "dev 9"]
    assert data.test[0] == Example("test 0", ("a", "b", "c"))
    assert "there is no train split, so dev is divided" in str(data)


def test_a_train_split_is_preferred_to_a_share(write):
    record = {"dialogue": "Hi", "summary": "a"}
    _, splits = find_data("dialogsum", write(record, "train.jsonl", "dev.jsonl", "test.jsonl"))
    assert splits == FILES["dialogsum"][0]
    assert not splits.note


def test_of_piqa_the_right_solution_is_learned_and_the_wrong_one_kept_for_the_score(write):
    record = {"goal": "Eat. ", "sol1": "no ", "sol2": " yes", "label": 1}
    source, splits = find_data("piqa", write(record, "train.jsonl", "valid.jsonl"))
    assert (splits.train, splits.test) == ("train[:90%]", "valid")
    assert source.format.read(record) == Example("Question: Eat.", ("yes",), ("no",))
    with pytest.raises(ValueError, match="the answers of this split are hidden"):
        source.format.read({**record, "label": -1})


def test_webquestions_has_the_authors_splits(write):
    record = {"qText": "who?", "answers": ["Ann", "Bo"]}
    folder = write([record], "trainmodel.json", "val.json", "test.json")
    data = read_data(*find_data("webquestions", folder))
    assert data.test == (Example("question:who?", ("Ann", "Bo")),)


def test_a_folder_that_lacks_files_is_refused(write):
    folder = write({}, "train.jsonl")
    with pytest.raises(
        ValueError, match=r"lacks files of dialogsum: expected one for each of dev, test, train"
    ):
        find_data("dialogsum", folder)


REFUSED = [
    (["--scored", "129"], "--scored: expected at most 128, the texts of test, got 129"),
    (["--held-out", "200"], "--held-out: expected at most 128, the texts of test, got 200"),
    (["--length", "20"], "--length: expected at least 22, for answers of 16 tokens, got 20"),
    (["--texts", "1"], "--batch-size: expected at most 1, the texts to train on, got 2"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_the_data_do_not_have_is_refused_before_the_model_is_read(more, message, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Costs", None)
    result = compare(tmp_path / "new", *more)
    assert (result.exit_code, result.stderr[:7]) == (2, "error: ")
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_a_prompt_to_answer_is_the_beginning_of_the_row_that_is_trained_on(batches):
    text = Example("Anna went home.", ("Anna left.",))
    row, prompt = batches.batch([text]), batches.prompt(text).prompt
    unlabelled = row["input_ids"][row["attention_mask"].bool() & (row["labels"] < 0)]
    assert tuple(unlabelled.tolist()) == prompt
    cut = batches.prompt(Example("Anna " * 100, ("x",))).prompt
    assert len(cut) + batches.answer_length + 1 == 40


def test_the_likelier_answer_is_chosen_as_the_models_own_loss_says(data):
    language = load_language_model("demo")
    batches = Batches(language.tokenizer, PIQA_SOLUTIONS, size=2, length=96, answer_length=16)
    for text, other in zip(data.test[:4], data.test[4:8], strict=True):
        choice = Example(text.source, text.references, other.references)
        answers, batch = batches.choices(choice)
        with torch.no_grad():
            chosen = scores._likeliest(language.model, answers, batch)
            rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(2)]
            means = [language.model.eval()(**row).loss.item() for row in rows]
        totals = [mean * int((row["labels"] >= 0).sum()) for mean, row in zip(means, rows, strict=True)]
        assert chosen == answers[totals.index(min(totals))]
        assert language.model.training is False


def test_equally_likely_answers_do_not_count_as_right(data):
    language = load_language_model("demo")
    batches = Batches(language.tokenizer, PIQA_SOLUTIONS, size=2, length=96, answer_length=16)
    text = Example("Anna went home.", ("a",), ("b",))
    _, batch = batches.choices(Example(text.source, ("a",), ("a",)))
    with torch.no_grad():
        assert scores._likeliest(language.model, ("a", "b"), batch) == "b"


def test_scores_stand_beside_the_loss_in_runs_table_plots_and_page(tmp_path, monkeypatch):
    asked = []

    def answer(model, tokenizer, prompts, *, max_new_tokens):
        asked.append((len(prompts), max_new_tokens, type(model).__name__))
        return [text.references[0] for text in read_data(*find_data("demo", None)).test[: len(prompts)]]

    monkeypatch.setattr(scores, "generate_answers", answer)
    arms = ["--arms", "full,last_layers", "--purposes", "steps", "--steps", "1"]
    rows = tiny(tmp_path, *arms, "--scored", "3")
    perfect = {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}
    assert [row["scores"] for row in rows.values()] == [perfect, perfect]
    assert asked == [(3, 16, "LlamaForCausalLM")] * 2
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "| rouge1, % | minus full (95 % interval) |" in table
    assert "| 100.00 | +0.00 (one seed) |" in table
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "rouge1, %" in page
    assert str(ARMS["last_layers"]) in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "://" not in page
    assert (tmp_path / "scores_by_flops.png").stat().st_size > 1000


FROM_PEFT = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"


@pytest.mark.slow
@pytest.mark.filterwarnings(FROM_PEFT)
def test_a_model_with_compiled_blocks_and_labelled_logits_answers_at_the_end(tmp_path):
    arms = ["--arms", "full,lora_labelled", "--purposes", "steps", "--steps", "1", "--compiler", "eager"]
    for row in tiny(tmp_path, *arms, "--scored", "2").values():
        assert row["scores"].keys() == {"rouge1", "rouge2", "rougeL"}
        assert all(0 <= value <= 100 for value in row["scores"].values())
        assert row["scoring_seconds"] > 0


def test_the_cost_is_printed_first_and_a_dry_run_stops_there(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run", None)
    arms = ["--arms", "full,last_layers", "--budgets", "0.5", "--seeds", "0,1"]
    result = compare(tmp_path / "new", *arms, "--dry-run")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "6 runs to do: " in output
    assert "full: 2 runs of 2 steps" in output
    assert "last_layers at 0.5: 2 runs of 4 steps" in output
    assert "on this machine, as given." in output
    assert not (tmp_path / "new").exists()


def test_the_speed_follows_from_finished_runs():
    rows = [
        {"flops": 600, "seconds": 2.0, "starting_seconds": 4.0, "scoring_seconds": 3.0},
        {"flops": 300, "seconds": 1.0, "starting_seconds": 2.0, "scoring_seconds": 5.0},
    ]
    speed = remembered_speed(rows)
    work = plan.Work(
        runs=(Run(arm="full", budget=None, learning_rate=1, seed=0, steps=1, purpose="steps"),) * 2,
        finished=2,
        training_flops=900,
        evaluation_flops=300,
        scored=2,
    )
    assert speed.seconds(work) == 1200 / 300 + 2 * 3.0 + 2 * 5.0


def test_a_comparison_of_an_earlier_version_is_read_without_scores_and_times_of_starting(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "full", "loss": 2.5, "flops": 600, "seconds": 2.0}\n')
    (row,) = Records(tmp_path / "runs.jsonl", Console()).rows.values()
    assert values_of(row) == {"loss": 2.5}
    speed = remembered_speed([row])
    assert (speed.flops_per_second, speed.starting_seconds, speed.scoring_seconds) == (300, 0, 0)


def tiny_setting(folder, **more):
    sizes = {"steps": 2, "batch_size": 2, "length": 48, "answer_length": 16, "held_out": 2, "measured": 2}
    shared = {"model": "demo", "dataset": "demo", "compiler": "none", "float32": True}
    return command._setting(CompareOptions(output=folder, **shared | sizes | more))


def test_the_speed_is_that_of_a_second_step(measured_speed, tmp_path):
    tiny = tiny_setting(tmp_path, scored=2)
    speed = measured_speed(
        Run(arm="full", budget=None, learning_rate=1e-4, seed=0, steps=2, purpose="steps"), tiny, Costs(tiny)
    )
    assert speed.flops_per_second > 0
    assert speed.starting_seconds > 0
    assert speed.scoring_seconds > 0


def row(arm, seed, loss, purpose="steps"):
    shared = {"budget": None, "learning_rate": 1e-4, "steps": 10, "flops_fraction": 1.0, "scores": {}}
    return {"arm": arm, "seed": seed, "loss": loss, "purpose": purpose, **shared}


def test_differences_are_paired_by_seed():
    rows = [row("full", 0, 2.0), row("full", 1, 3.0), row("lora", 1, 3.2), row("lora", 0, 2.1)]
    full, lora = summarise(rows)
    loss = full.values["loss"]
    assert (full.name, loss.difference, loss.interval) == ("full", None, None)
    assert lora.values["loss"].difference == pytest.approx(0.15)
    # Student's t of one degree of freedom at 97.5 % is 12.706; the error of the mean is 0.05.
    assert lora.values["loss"].interval == pytest.approx(12.706 * 0.05, rel=1e-3)


def test_scores_are_paired_like_losses():
    rows = [row("full", 0, 2.0), row("full", 1, 3.0), row("lora", 1, 3.2), row("lora", 0, 2.1)]
    rows = [{**each, "scores": {"accuracy": 10 * each["loss"]}} for each in rows]
    _, lora = summarise(rows)
    assert lora.values["accuracy"].mean == pytest.approx(26.5)
    assert lora.values["accuracy"].difference == pytest.approx(1.5)
    assert lora.values["accuracy"].interval == pytest.approx(12.706 * 0.5, rel=1e-3)


def test_full_fine_tuning_is_in_the_tables_of_both_purposes():
    rows = [row("full", 0, 2.0, "flops"), row("lora", 0, 2.1), row("lora", 0, 2.0, "flops")]
    assert [[line[0] for line in table.rows] for table in tables_of(rows)] == [["full", "lora"]] * 2
    assert [table.title for table in tables_of(rows[:2])] == ["At equal steps", "At equal FLOPs"]


def test_one_seed_has_no_interval():
    assert paired_interval([0.1]) is None
    assert summarise([row("full", 0, 2.0), row("lora", 0, 2.5)])[1].values["loss"].interval is None
    assert math.isfinite(paired_interval([0.1, 0.2]))
