"""Budgets in seconds and bytes, and energy, in a run of `finetune`: told before work, counted, summarised."""

import itertools
import json
from dataclasses import replace

import pytest

from gtcompile import BudgetError
from gtcompile.tools.common import energy
from gtcompile.tools.common.energy import ESTIMATED, MEASURED, check_energy_known, joules_counter
from gtcompile.tools.finetune.run import finetune
from gtcompile.tools.finetune.summary import _energy, _energy_figures, summary_from
from gtcompile.tools.runs.settings import Settings, settings_from
from tests.tools.test_finetune import reporter, settings  # noqa: F401


@pytest.fixture(scope="module")
def estimated(settings, tmp_path_factory):  # noqa: F811
    """A run within a budget of bytes on a machine that is said to draw 100 watts."""
    output = tmp_path_factory.mktemp("run") / "run"
    asked = replace(settings, epochs=1, budget=1.0, budget_memory=300_000, watts=100.0, grid_intensity=360.0)
    return output, finetune(asked, output, reporter())


def test_a_run_keeps_its_budget_of_bytes_and_records_the_prediction(estimated):
    output, summary = estimated
    selections = json.loads((output / "selections.json").read_text())
    for selection in selections:
        assert selection["saved_bytes"] < selection["predicted_bytes"] <= 300_000
        assert selection["predicted_seconds"] is None
        assert len(selection["trained"]) < selection["selectable"]
    assert summary.title == "best, budget 0.3 MB"


def test_energy_is_estimated_from_watts_and_said_to_be(estimated):
    output, summary = estimated
    assert summary.joules == pytest.approx(100 * (summary.training_seconds + summary.selecting_seconds))
    assert summary.energy_source == ESTIMATED
    figures = _energy_figures(summary)
    assert list(figures) == ["Wh, estimated from --watts", "g CO2e at 360 g/kWh"]
    grams = summary.joules / 3.6e6 * 360
    assert float(figures["g CO2e at 360 g/kWh"]) == pytest.approx(grams, rel=1e-3)
    assert summary_from(json.loads((output / "summary.json").read_text())) == summary


def test_energy_that_was_counted_in_every_step_wins_over_watts():
    steps = [{"joules": 5.0, "seconds": 1.0}, {"joules": 7.5, "seconds": 1.0}]
    assert _energy(100.0, steps, []) == {"joules": 12.5, "energy_source": MEASURED}
    assert _energy(100.0, [*steps, {"seconds": 2.0}], [{"seconds": 1.0}]) == {
        "joules": 500.0,
        "energy_source": ESTIMATED,
    }
    assert _energy(None, [{"seconds": 2.0}], []) == {}


def test_a_counter_is_read_around_every_step(settings, tmp_path, monkeypatch):  # noqa: F811
    readings = itertools.count(step=3)
    monkeypatch.setattr(
        "gtcompile.tools.finetune.recorder.joules_counter", lambda _: lambda: float(next(readings))
    )
    summary = finetune(replace(settings, epochs=1), tmp_path / "run", reporter())
    assert summary.joules == 3.0 * summary.steps
    assert summary.energy_source == MEASURED


def test_a_processor_has_no_counter_that_can_be_read():
    assert joules_counter("cpu") is None


def test_carbon_without_any_energy_is_refused_before_work(settings, tmp_path):  # noqa: F811
    if energy.joules_counter("cuda") is not None:
        pytest.skip("this machine has a counter")
    with pytest.raises(ValueError, match=r"--grid-intensity: cpu has no energy counter .* give --watts"):
        finetune(replace(settings, grid_intensity=400.0), tmp_path / "run", reporter())
    assert not (tmp_path / "run").exists()
    check_energy_known(400.0, 60.0, "cpu")
    check_energy_known(None, None, "cpu")


def test_a_budget_of_bytes_that_trains_nothing_is_refused_with_the_smallest(settings, tmp_path):  # noqa: F811
    with pytest.raises(BudgetError, match="budget_memory 10 is too small") as caught:
        finetune(replace(settings, budget_memory=10), tmp_path / "run", reporter())
    assert caught.value.minimum_budget_memory > 10
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget_seconds": 0.0}, "--budget-seconds: expected greater than 0"),
        ({"budget_seconds": -1.0}, "--budget-seconds: expected greater than 0"),
        ({"budget_memory": 0}, "--budget-memory: expected greater than 0"),
        ({"budget_memory": 1.5}, "budget_memory: expected a value of type int"),
        ({"budget_memory": "8GB"}, "budget_memory: expected a value of type int"),
        ({"watts": -5.0}, "--watts: expected greater than 0"),
        ({"grid_intensity": 0.0}, "--grid-intensity: expected greater than 0"),
        (
            {"budget_seconds": 1.0, "policy": "sampled"},
            "--policy: expected best, which --budget-seconds needs",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        settings_from({"model": "demo", "dataset": "demo", **given})


def test_a_budget_of_seconds_alone_limits_no_flops():
    asked = settings_from({"model": "demo", "dataset": "demo", "budget_seconds": 0.5})
    assert (asked.budget, asked.title) == (1.0, "best, budget 0.5 s a step")
    both = settings_from({"model": "demo", "dataset": "demo", "budget_seconds": 0.5, "budget": 0.7})
    assert (both.budget, both.title) == (0.7, "best, budget 0.7, 0.5 s a step")


def test_energy_and_carbon_make_no_run_another_one():
    saved = Settings(model="demo", dataset="demo")
    assert replace(saved, watts=50.0, grid_intensity=400.0).differences(saved.as_dict()) == []
    assert replace(saved, budget_seconds=1.0).differences(saved.as_dict()) == [
        "--budget-seconds was None and is now 1.0"
    ]
