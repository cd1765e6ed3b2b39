"""Operators and modules of PyTorch's own test databases train as in eager PyTorch."""

from types import ModuleType

import pytest
import torch

from gtcompile import train_only

SAMPLE = ("addmm", "cumprod", "index_put", "linalg.solve", "nn.functional.conv1d", "nn.BatchNorm1d")
"""Operators and modules of different kinds, for a quick look."""
GROUPS = 80
"""All of them, in so many groups."""
UPSTREAM: dict[tuple[str, str], str] = {}
"""Subjects and forms that `aot_eager` cannot train either, with the reason."""


@pytest.fixture(scope="module")
def databases() -> ModuleType:
    """The module that reads them; importing PyTorch's databases takes seconds."""
    from benchmarks import torch_databases

    return torch_databases


def refused(databases: ModuleType, names: list[str]) -> list[str]:
    """What is not as in eager PyTorch, or is right although it is listed as an exception."""
    known = databases.subjects()
    found = []
    for report in databases.examine([known[name] for name in names]):
        for result in report.results:
            reason = UPSTREAM.get((result.subject, result.form))
            if reason is None and not result.right:
                found.append(str(result))
            elif reason is not None and result.right:
                found.append(f"{result}; take it off the list: {reason}")
            elif reason is not None and not report.upstream.get(result.form):
                found.append(f"{result}, and aot_eager is right; not for this reason: {reason}")
        if report.costs not in (databases.EXACT, "not run") and not report.costs.startswith("refused"):
            found.append(f"{report.subject}: {report.costs}")
    return found


def test_a_sample_trains_as_in_eager_pytorch(databases):
    assert refused(databases, list(SAMPLE)) == []


@pytest.mark.long
@pytest.mark.parametrize("group", range(GROUPS))
def test_all_train_as_in_eager_pytorch(databases, group):
    assert refused(databases, list(databases.subjects())[group::GROUPS]) == []


def test_a_wrong_gradient_is_found_out(databases, monkeypatch):
    compiled = databases.compiled

    def with_doubled_gradients(model, backend):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
        return compiled(model, backend)

    monkeypatch.setattr(databases, "compiled", with_doubled_gradients)
    (result,) = databases.check([databases.subjects()["mul"]], "plain", "specialized")
    assert "differs by" in result.difference


def test_a_gradient_too_many_is_found_out(databases, monkeypatch):
    monkeypatch.setattr(databases, "train_only", lambda run, trained: train_only(run, None))
    (result,) = databases.check([databases.subjects()["mul"]], "plain", "specialized")
    assert "is not None" in result.difference


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, 2.0], float("inf")),
        ([1.0, 2.0], [1.0, 2.0 + 2**-22], 1.0),
    ],
)
def test_differences_are_measured_in_units_of_rounding(databases, left, right, distance):
    measured = databases._distance(torch.tensor(left), torch.tensor(right))
    assert measured == pytest.approx(distance, rel=1e-5)
