"""Operators and modules of PyTorch's own test databases train as in eager PyTorch."""

from types import ModuleType

import pytest
import torch

from gtcompile import train_only

SAMPLE = ("addmm", "cumprod", "index_put", "linalg.solve", "nn.functional.conv1d", "nn.BatchNorm1d")
"""Operators and modules of different kinds, for a quick look."""
GROUPS = 80
"""All of them, in so many groups."""


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """The module that runs and reports; importing PyTorch's databases takes seconds."""
    from benchmarks.torch_databases import report

    return report


@pytest.fixture(scope="module")
def comparison(report) -> ModuleType:
    """The module that compares one form of a subject with eager PyTorch."""
    from benchmarks.torch_databases import comparison

    return comparison


def unexpected(report: ModuleType, names: list[str]) -> list[str]:
    """What is not as in eager PyTorch, or is right although it is listed as an exception."""
    known = report.subjects()
    found = report.examine([known[name] for name in names])
    return [line for each in found for line in report.unexpected(each)]


@pytest.mark.slow
def test_a_sample_trains_as_in_eager_pytorch(report):
    assert unexpected(report, list(SAMPLE)) == []


@pytest.mark.long
@pytest.mark.parametrize("group", range(GROUPS))
def test_all_train_as_in_eager_pytorch(report, group):
    assert unexpected(report, list(report.subjects())[group::GROUPS]) == []


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the results are of torch 2.13")
def test_the_stored_results_are_as_expected_and_as_documented(report):
    stored = report.read_results(report.RESULTS)
    documented = (report.RESULTS.parents[2] / "docs" / "operators.md").read_text("utf-8")
    assert {each.subject for each in stored} <= report.subjects().keys()
    assert [line for each in stored for line in report.unexpected(each)] == []
    for table in report.markdown(stored).strip().split("\n\n"):
        assert table in documented


def test_results_are_read_as_they_were_written(report, comparison, tmp_path):
    wrong = comparison.Result(subject="mul", form="plain", backend="hoisted", difference="is None", graphs=2)
    reports = [
        report.Report(subject="mul", forms=("plain",), differences=(wrong,), upstream={"plain": ""}),
        report.Report(subject="add", forms=(), not_run="RuntimeError: no kernel"),
    ]
    report.write_results(tmp_path / "results.jsonl", reports)
    assert report.read_results(tmp_path / "results.jsonl") == reports


def test_what_upstream_fails_must_be_listed_and_must_fail(report, comparison, monkeypatch):
    wrong = comparison.Result(subject="mul", form="plain", backend="hoisted", difference="is None")
    failing = report.Report(
        subject="mul", forms=("plain",), differences=(wrong,), upstream={"plain": "is None"}
    )
    right_upstream = report.Report(
        subject="mul", forms=("plain",), differences=(wrong,), upstream={"plain": ""}
    )
    right = report.Report(subject="mul", forms=("plain",))
    assert report.unexpected(failing) == [str(wrong)]
    assert report.unexpected(right) == []
    monkeypatch.setattr(report, "UPSTREAM", {("mul", "plain"): "a reason"})
    assert report.unexpected(failing) == []
    assert "aot_eager is right" in report.unexpected(right_upstream)[0]
    assert "take it off the list" in report.unexpected(right)[0]


def test_costs_must_be_exact_or_refused_or_listed_as_fewer(report, monkeypatch):
    def of_costs(costs):
        return report.unexpected(report.Report(subject="mul", forms=("plain",), costs=costs))

    assert not any(map(of_costs, ("exact", "zero", "refused: no formula")))
    assert of_costs("wrong: 3 predicted")
    assert of_costs("fewer: 3 predicted")
    monkeypatch.setattr(report, "LEAVES_OUT", {"mul": "a gradient that nothing needs"})
    assert not of_costs("fewer: 3 predicted")
    assert of_costs("exact")
    assert of_costs("wrong: 3 predicted")


def test_a_wrong_gradient_is_found_out(report, comparison, monkeypatch):
    compiled = comparison.compiled

    def with_doubled_gradients(model, backend):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
        return compiled(model, backend)

    monkeypatch.setattr(comparison, "compiled", with_doubled_gradients)
    (result,) = comparison.check([report.subjects()["mul"]], "plain", "specialized")
    assert "differs by" in result.difference


def test_a_gradient_too_many_is_found_out(report, comparison, monkeypatch):
    monkeypatch.setattr(comparison, "train_only", lambda run, trained: train_only(run, None))
    (result,) = comparison.check([report.subjects()["mul"]], "plain", "specialized")
    assert "is not None" in result.difference


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, 2.0], float("inf")),
        ([1.0, 2.0], [1.0, 2.0 + 2**-22], 1.0),
    ],
)
def test_differences_are_measured_in_units_of_rounding(left, right, distance):
    from benchmarks.torch_databases.steps import _distance

    assert _distance(torch.tensor(left), torch.tensor(right)) == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize(
    ("exact", "is_rounding"),
    [
        (None, False),
        (1.0, False),  # eager PyTorch rounds as usual, so this is no rounding
        (1.0 + 50 * 2**-23, True),  # its own error is as large
        (1.5, False),  # in double precision it computes something else
    ],
)
def test_where_large_terms_cancel_eager_pytorch_is_not_exact_either(exact, is_rounding):
    from benchmarks.torch_databases.steps import Step, difference

    def step(value: float, dtype: torch.dtype) -> Step:
        return Step(requires_grad=True, values={"the loss": torch.tensor(value, dtype=dtype)}, flops=0)

    actual, expected = step(1.0 + 100 * 2**-23, torch.float32), step(1.0, torch.float32)
    doubled = None if exact is None else step(exact, torch.float64)
    assert (difference(actual, expected, doubled) == "") == is_rounding
