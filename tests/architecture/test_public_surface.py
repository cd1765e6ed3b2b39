"""The names people write in their programs: they may grow, and these stay."""

import contextlib
import inspect
import re
import runpy
from importlib.metadata import entry_points, requires, version

import pytest
import torch

import gtcompile
from gtcompile import testing, torch_internals
from gtcompile.torch_internals import SUPPORTED, check_version
from tests.support.models import Regression, make_batch, step

SIGNATURES = {
    "compile_blocks": (["model"], ["blocks", "options"]),
    "train_only": (["model", "patterns"], []),
    "trained_parameters": (["model"], []),
    "backward_costs": (["model", "batch"], ["loss_fn"]),
    "dependency_graph": (["model", "batch"], ["loss_fn"]),
    "register_flops": (["operator", "formula"], []),
    "measure_importance": (["model", "optimizer", "batches"], ["loss_fn"]),
    "select_parameters": (["costs", "importance", "budget_fraction"], ["always", "never"]),
    "AdaptiveBackprop": (["model", "optimizer", "budget_fraction"], ["policy", "loss_fn"]),
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


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git123", "2.12.1+cpu", "2.13.0+cu130", "2.14.1", "2.15.99"]
)
def test_a_supported_torch_is_accepted(version):
    check_version(version, anyway=False)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0", "2.10.2+cpu", "2.16.0", "3.0.0"])
def test_another_torch_is_refused_unless_one_insists(version):
    expected = f"supports torch >=2.11,<2.16; this is torch {version}"
    with pytest.raises(ImportError, match=re.escape(expected)) as raised:
        check_version(version, anyway=False)
    assert "GTCOMPILE_ANY_TORCH=1" in str(raised.value)
    check_version(version, anyway=True)


def test_the_supported_range_is_the_one_that_pip_is_told():
    (torch_requirement,) = [r for r in requires("gtcompile") or [] if r.startswith("torch")]
    assert f">={SUPPORTED[0]}" in torch_requirement
    assert f"<{SUPPORTED[1]}" in torch_requirement


@pytest.mark.parametrize("insisted", [False, True])
def test_the_import_itself_refuses_another_torch(insisted, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setenv("GTCOMPILE_ANY_TORCH", "1" if insisted else "0")
    expected = (
        contextlib.nullcontext() if insisted else pytest.raises(ImportError, match=r"this is torch 2.9.1")
    )
    with expected:
        runpy.run_path(torch_internals.__file__)
