"""`gtcompile inspect` as it is called: what it prints at 100 columns, explains, compares and refuses."""

import dataclasses
import functools
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig
from typer.testing import CliRunner, Result

from gtcompile.cli import app
from gtcompile.selection.selection import select_parameters
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.inspect import command
from gtcompile.tools.inspect.options import PlanOptions
from gtcompile.tools.inspect.text import DottedName, bar, has_segments, percentage
from gtcompile.tools.inspect.why import selection_lines

SHAPE = ("--batch-size", 2, "--length", 8)


def run(*arguments: object, columns: int = 100) -> Result:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def printed(*arguments: object) -> str:
    result = run("inspect", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = run("inspect", *arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module", autouse=True)
def inspected_once() -> Iterator[None]:
    """The tests print the inspections of a few models in many ways."""
    inspect = functools.cache(command.inspect_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "inspect_model", lambda model, options, _: inspect(model, options))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of three layers."""
    return configured(tmp_path_factory.mktemp("opt"), 3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of twelve layers, so that there is a `layers.1` and a `layers.10`."""
    return configured(tmp_path_factory.mktemp("opt"), 12)


def configured(folder: Path, layers: int) -> Path:
    OPTConfig(
        vocab_size=300,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=layers,
        ffn_dim=32,
        num_attention_heads=2,
    ).save_pretrained(folder)
    return folder


def test_it_is_readable_at_100_columns_and_without_colour(deep: Path) -> None:
    text = printed(deep, *SHAPE, "--top", 0)
    assert "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 100
    for layer in range(12):  # no name is broken over two lines
        assert f"model.decoder.layers.{layer}.self_attn.k_proj.weight " in text
    assert "·" in text
    assert "█" in text


def test_a_filter_takes_whole_path_segments(deep: Path) -> None:
    rows = json.loads(printed(deep, *SHAPE, "--json"))["parameters"]
    own = [row["parameter"] for row in rows if ".layers.1." in row["parameter"]]
    text = printed(deep, *SHAPE, "--filter", "layers.1", "--top", 0)
    assert all(name in text for name in own)
    assert "layers.10" not in text
    assert has_segments("model.layers.1.fc1", "layers.*.fc1")
    assert not has_segments("model.layers.10.fc1", "layers.1")


def test_rows_are_sorted_as_asked(model: Path) -> None:
    rows = json.loads(printed(model, *SHAPE, "--json"))["parameters"]
    for order, key in (("marginal", "marginal_flops"), ("size", "elements")):
        top = max(rows, key=lambda row, key=key: row[key])  # type: ignore[misc]
        listed = printed(model, *SHAPE, "--sort", order, "--top", 1).split("1 of ")[1]
        assert top["parameter"] in listed


def test_why_explains_a_trained_and_a_frozen_parameter(model: Path) -> None:
    rows = json.loads(printed(model, *SHAPE, "--json"))["parameters"]
    trained, frozen = (
        next(row["parameter"] for row in rows if row["status"] == status) for status in ("trained", "frozen")
    )
    text = printed(model, *SHAPE, "--why", trained, "--why", frozen)
    assert "runs for 1 trained" in text
    assert "is eliminated" in text
    assert f"it is the gradient of {trained}" in text
    assert f"it is the gradient of {frozen}" in text
    assert "\n  selected; its importance is" in text
    assert "the best set without it has" in text
    assert text.count("freezing ") == 1  # what is needed for one parameter alone is told once
    assert f"training one of these brings it back: {frozen}" in text


def test_why_names_the_budget_that_brings_a_parameter_within_reach(model: Path) -> None:
    first = json.loads(printed(model, *SHAPE, "--json"))["parameters"][0]["parameter"]
    far = printed(model, *SHAPE, "--budget", 0.5, "--why", first)
    assert "not selected, because it is out of reach: a step that trains nothing else takes" in far
    within = far.partition("--budget ")[2].partition(" brings")[0]
    assert "out of reach" not in printed(model, *SHAPE, "--budget", within, "--why", first)


@pytest.mark.parametrize("budget", [0.74, 0.95])
def test_what_why_says_would_select_a_parameter_does(model: Path, budget: float) -> None:
    """The importance and the budget that it names decide, for random importances."""
    plan = command.inspect_model(str(model), PlanOptions(), None)
    draw = random.Random(0)
    importance = {fqn: draw.uniform(0.1, 1) for fqn in sorted(plan.costs.fqns)}
    selection = select_parameters(plan.costs, importance, budget)
    plan = dataclasses.replace(plan, importance=importance, selection=selection)
    frozen = sorted(plan.costs.fqns - selection.trained)
    within = [fqn for fqn in frozen if "out of reach" not in selection_lines(plan, fqn)[0]]
    assert within
    for fqn in within[:5]:
        text = "\n".join(selection_lines(plan, fqn))
        assert "not selected, although the budget can train it; its importance is" in text
        wanted = float(text.partition("with an importance of ")[2].partition(":")[0])
        for factor, selected in ((0.99, False), (1.01, True)):
            changed = {**importance, fqn: wanted * factor}
            assert (fqn in select_parameters(plan.costs, changed, budget).trained) is selected, fqn
        paid = float(text.partition("--budget ")[2].partition(" would pay")[0])
        assert plan.costs.step_flops(selection.trained | {fqn}) <= paid * plan.costs.full_flops


def test_why_in_json_holds_what_the_lines_say(model: Path) -> None:
    plan = command.inspect_model(str(model), PlanOptions(shape=BatchShape(batch_size=2, length=8)), None)
    trained = min(plan.selection.trained)
    far = plan.costs.parameters[0].fqn
    node = next(node.name for node in plan.joint.module.graph.nodes if node.op == "call_function")
    asked = [option for subject in (trained, far, node) for option in ("--why", subject)]
    inside, outside, other = json.loads(printed(model, *SHAPE, *asked, "--json"))["why"]
    assert (inside["subject"], inside["alive"], inside["needed_by"]) == (trained, True, [trained])
    marginal = plan.costs.marginal_flops(trained, plan.selection.trained - {trained})
    without = select_parameters(plan.costs, plan.importance, 0.5, never=[trained])
    assert inside["selection"] == {
        **{"parameter": trained, "selected": True, "within_reach": True, "another_fits": True},
        **{"importance": plan.importance[trained], "marginal_flops": marginal, "budget": None},
        "place": 1 + sum(value > plan.importance[trained] for value in plan.importance.values()),
        "left_flops": plan.selection.budget_flops - plan.selection.step_flops,
        "importance_of_other_plan": without.importance,
        "importance_needed": None,
        "alone_flops": plan.costs.step_flops({trained}),
    }
    beyond = outside["selection"]
    assert (beyond["parameter"], beyond["selected"], beyond["within_reach"]) == (far, False, False)
    assert beyond["alone_flops"] == plan.costs.step_flops({far}) > plan.selection.budget_flops
    assert f"--budget {beyond['budget']} brings it within reach" in printed(model, *SHAPE, "--why", far)
    assert other["selection"] is None


def test_a_difference_names_what_comes_and_goes(model: Path) -> None:
    values = json.loads(printed(model, *SHAPE, "--diff", "none", "plan", "--json"))
    trained = [row["parameter"] for row in values["parameters"] if row["status"] == "trained"]
    assert values["diff"]["entered"] == sorted(trained)
    assert values["diff"]["left"] == []
    assert values["diff"]["gained_flops"] == values["step_flops"] - values["forward_flops"]
    assert values["diff"]["gained_bytes"] == values["step_saved_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--filter", "layer.1"), "matches no parameter"),
        (("--why", "model.decoder.layers.1.fc1.weigth"), "model.decoder.layers.1.fc1.weight"),
        (("--diff", "all", "model.decoder.layers.1.fc1.weigth"), "model.decoder.layers.1.fc1.weight"),
        (("--diff", "1", "2"), "only a run has an epoch 1"),
        (("--sort", "colour"), "expected one of name, cost"),
        (("--top", -1), "--top: expected at least 0"),
        (("--html", "no/such/folder/report.html"), "there is no folder"),
        (("--export", "graph.svg"), "expected a file ending in"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    model: Path, arguments: tuple[object, ...], message: str
) -> None:
    said = refused(model, *SHAPE, *arguments)
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", *SHAPE)


def test_a_run_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 0}')
    said = refused(tmp_path)
    assert "written by another version" in said
    assert "--importances" in said


def test_a_factory_whose_model_returns_no_loss_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lossless.py").write_text(
        "import torch\n"
        "class Lossless(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return Lossless(4, 4), {'x': torch.ones(2, 4)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "loss" in refused("lossless:make")


def test_a_report_that_cannot_be_written_loses_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "/.report.html.a1b2")

    monkeypatch.setattr("os.replace", full_disk)
    result = run("inspect", model, *SHAPE, "--html", tmp_path / "report.html")
    assert result.exit_code == 2
    assert "plan by block" in result.stdout
    assert f"could not write {tmp_path / 'report.html'}: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


@given(share=st.floats(0, 1))
def test_a_percentage_is_100_only_for_all_and_0_only_for_nothing(share: float) -> None:
    assert (percentage(share) == "100%") == (share == 1)
    assert (percentage(share) == "0%") == (share == 0)


def test_a_bar_is_full_only_for_all_and_empty_only_for_nothing() -> None:
    assert bar(0.0).count("█") == 0
    assert bar(1e-9).count("█") == 1
    assert bar(0.999).count("·") == 1
    assert bar(1.0).count("·") == 0


def test_eighty_columns_are_enough_for_blocks(model: Path) -> None:
    result = run("inspect", model, *SHAPE, "--top", 0, columns=80)
    lines = [line for line in result.stdout.splitlines() if line.startswith(" ")]
    assert max(map(len, lines)) <= 80
    assert "model.decoder.final_layer_norm " in result.stdout
    assert bar(1.0, 10) in result.stdout
    folded = [line.split()[0] for line in lines if line.startswith(" .")]
    assert folded
    assert all(end.endswith((".weight", ".bias")) for end in folded)


@given(st.lists(st.text("abc_", max_size=9), min_size=1).map(".".join), st.integers(1, 30))
def test_a_name_is_broken_before_dots_alone_and_only_where_it_must_be(name: str, width: int) -> None:
    lines = DottedName(name).lines(width)
    assert "".join(lines) == name
    assert all(line.startswith(".") for line in lines[1:])
    assert all(len(line) <= width or "." not in line[1:] for line in lines)
    assert all(len(line + after[: (after + ".").index(".", 1)]) > width for line, after in pairwise(lines))


def test_the_batch_of_a_factory_is_told_by_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lossy.py").write_text(
        "import torch\n"
        "class Lossy(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).sum()\n"
        "def make():\n"
        "    return Lossy(4, 4), {'x': torch.ones(2, 4)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "batches of x 2x4," in printed("lossy:make", "--budget", 1)


@pytest.mark.parametrize("content", ['{"a": 1}', '[{"epoch": 0}]', "[3]"])
def test_a_run_with_broken_selections_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text('{"format": 1}')
    (tmp_path / "selections.json").write_text(content)
    assert "expected a list of selections with" in refused(tmp_path)
