"""The names people write in their programs: they may grow, and these stay."""

import inspect
from importlib.metadata import entry_points, version

import pytest
import torch

import gtcompile
from gtcompile import testing
from tests.support.models import Regression, make_batch, step

SIGNATURES = {
    "compile_blocks": (["model"], ["blocks", "options"]),
    "train_only": (["model", "patterns"], []),
    "trained_parameters": (["model"], []),
    "backward_costs": (["model", "batch"], ["loss_fn"]),
    "dependency_graph": (["model", "batch"], ["loss_fn"]),
    "register_flops": (["operator", "formula"], []),
    "measure_importance": (["model", "optimizer", "batches"], ["loss_fn"]),
    "select_parameters": (
        ["costs", "importance", "budget_fraction"],
        ["always", "never", "budget_seconds", "budget_memory", "prices"],
    ),
    "step_prices": (["model", "optimizer", "batch"], ["loss_fn", "seconds", "memory"]),
    "AdaptiveBackprop": (
        ["model", "optimizer", "budget_fraction"],
        ["policy", "loss_fn", "budget_seconds", "budget_memory"],
    ),
}
"""Leading positional parameters, and keyword-only ones that must exist."""
ATTRIBUTES = {
    "BackwardCosts": [
        "forward_flops",
        "full_flops",
        "step_flops",
        "marginal_flops",
        "minimum_budget_fraction",
    ],
    "Selection": ["trained", "step_flops", "budget_flops", "importance", "importance_bound"],
    "AdaptiveBackprop": ["reselect", "step", "state_dict", "load_state_dict"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_function_takes_what_the_design_says(name):
    expected, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(gtcompile, name)).parameters
    assert list(parameters)[: len(expected)] == expected
    kinds = {parameters[n].kind for n in expected}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert set(keywords) <= parameters.keys()
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert set(required) <= set(expected), "a caller of the published signature would miss an argument"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_public_value_has_what_the_design_says(name):
    cls = getattr(gtcompile, name)
    known = set(dir(cls)) | set(getattr(cls, "__dataclass_fields__", ()))
    assert set(ATTRIBUTES[name]) <= known


def test_every_name_in_all_exists_and_is_documented():
    for name in gtcompile.__all__:
        assert inspect.getdoc(getattr(gtcompile, name)), name


def test_the_version_is_that_of_the_installed_package():
    assert gtcompile.__version__ == version("gtcompile")


def test_the_oracles_are_shipped():
    assert list(inspect.signature(testing.reference_gradients).parameters) == ["model", "batch", "trained"]
    assert list(inspect.signature(testing.assert_same_gradients).parameters) == [
        "actual",
        "expected",
        "rtol",
        "atol",
    ]


def test_the_backend_is_registered_with_torch_and_the_command_with_the_shell():
    backends = {e.name: e.value for e in entry_points(group="torch_dynamo_backends")}
    assert backends["gtcompile"] == "gtcompile.compiler.backend:gtcompile"
    assert "gtcompile" in torch.compiler.list_backends()
    assert "gtcompile" in {e.name for e in entry_points(group="console_scripts")}


def test_the_backend_works_by_its_name():
    model = torch.compile(Regression(2), backend="gtcompile", options={"compiler": "eager"})
    assert step(model, make_batch()) > 0


def test_errors_say_who_can_act():
    assert issubclass(gtcompile.CaptureError, gtcompile.GTCompileError)
    assert issubclass(gtcompile.GraphContractError, gtcompile.GTCompileError)
    assert issubclass(gtcompile.BudgetError, gtcompile.GTCompileError)
    error = gtcompile.BudgetError("too small", 0.37)
    assert (str(error), error.minimum_budget_fraction) == ("too small", 0.37)
