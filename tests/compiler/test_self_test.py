"""The self-test: passes on this torch, runs once, leaves no trace, and names each contract that is broken."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gtcompile import GraphContractError, compile_blocks, torch_internals
from gtcompile.compiler import self_test
from tests.support.models import Recipe, Regression, captures, counted_step, make_batch


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> list[int]:
    """A machine on which nothing was tested; counts how often the self-test runs."""
    runs: list[int] = []
    run = self_test.run_self_test
    monkeypatch.setattr(self_test, "cache_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "run_self_test", lambda: runs.append(1) or run())
    self_test.check_contracts.cache_clear()
    yield runs
    self_test.check_contracts.cache_clear()


@pytest.fixture
def passing(fresh, monkeypatch) -> list[int]:
    """The same, with a self-test that finds nothing and takes no time."""
    monkeypatch.setattr(self_test, "run_self_test", lambda: fresh.append(1))
    return fresh


def test_this_torch_passes_and_is_tested_once(fresh):
    self_test.check_contracts()
    self_test.check_contracts.cache_clear()  # as in another process
    self_test.check_contracts()
    assert len(fresh) == 1


def test_another_torch_is_tested_again(passing, monkeypatch):
    self_test.check_contracts()
    self_test.check_contracts.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    self_test.check_contracts()
    assert len(passing) == 2


def test_it_runs_inside_the_first_compilation_and_leaves_no_trace(fresh):
    model, batch = Regression(), make_batch()
    random = torch.get_rng_state()
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    first = counted_step(compiled, batch)
    assert captures() == 1
    assert counted_step(compiled, batch) == first > 0
    assert fresh == [1]
    assert torch.equal(torch.get_rng_state(), random)


def test_where_the_cache_cannot_be_written_the_next_process_tests_again(passing, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(self_test, "cache_dir", lambda: str(tmp_path / "file"))
    self_test.check_contracts()
    self_test.check_contracts.cache_clear()
    self_test.check_contracts()
    assert len(passing) == 2


def test_a_broken_contract_stops_the_first_compilation_and_is_not_forgotten(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(self_test, "REENTRANT_CHECKPOINT_NODE", "Renamed")
    for _ in range(2):
        with pytest.raises(
            GraphContractError, match=r"torch 2\.\S+ breaks a contract.*checkpoint is .*; install"
        ):
            compile_blocks(Recipe(("residual", "residual")).model())
    assert not list(Path(tmp_path).rglob("self-test-*"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("COMPILED_REGION", "to autograd compiled code is CompiledFunctionBackward, not renamed"),
        ("EXAMPLE_VALUE", "inputs of Dynamo's graphs have no 'renamed'"),
        ("RECOMPUTE", "the partitioner no longer reads 'renamed'"),
        ("SAVED_RANDOM_STATE", "the partitioner no longer calls saved random states 'renamed'"),
        ("DESCRIPTOR", "the outputs of Inductor's graphs have no 'renamed'"),
        ("VISIBLE_OUTPUTS", "the outputs of Inductor's graphs have no 'renamed'"),
        ("VALUE", "inputs of Inductor's graphs have no 'renamed'"),
        ("STATIC_INPUTS", "compile_fx_inner is not given renamed"),
        (
            "IS_BACKWARD",
            "compile_fx_inner was not called for a forward, then with renamed=True|random numbers",
        ),
        ("INDUCTOR_RANDOM", "operators for random numbers no longer have 'renamed'"),
        ("DONATED_INPUTS", "AOTAutograd's metadata has no renamed"),
    ],
)
def test_a_renamed_string_is_named(monkeypatch, name, said):
    monkeypatch.setattr(self_test, name, "renamed")
    with pytest.raises(GraphContractError, match=said):
        self_test.run_self_test()


def test_a_setting_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(torch_internals, "SETTINGS", ((torch_internals.functorch_config, ("gone",)),))
    with pytest.raises(GraphContractError, match=r"torch\._functorch\.config has no setting gone"):
        self_test.run_self_test()


def test_an_attribute_that_is_gone_is_named_with_its_use(monkeypatch):
    monkeypatch.setattr(torch_internals, "ATTRIBUTES", ((torch.Tensor, "_gone", "something useful"),))
    with pytest.raises(GraphContractError, match=r"Tensor has no _gone \(something useful\)"):
        self_test.run_self_test()


def test_another_signature_is_named_by_what_failed(monkeypatch):
    monkeypatch.setattr(self_test, "compile_fx", lambda graph, inputs: graph)
    with pytest.raises(
        GraphContractError, match=r"before code generation failed with TypeError: .*inner_compile"
    ):
        self_test.run_self_test()


def test_gradients_of_frozen_parameters_are_named(monkeypatch):
    monkeypatch.setattr(self_test, "train_only", lambda model, trained: None)
    with pytest.raises(
        GraphContractError, match=r"with norm.bias, up.weight trained, gradients came for down"
    ):
        self_test.run_self_test()


def test_wrong_gradients_are_named(monkeypatch):
    region = self_test.Region

    class Doubled(region):
        def __call__(self, *inputs):
            (loss,) = super().__call__(*inputs)
            loss.register_hook(lambda gradient: 2 * gradient)
            return (loss,)

    monkeypatch.setattr(self_test, "Region", Doubled)
    with pytest.raises(GraphContractError, match=r"gradient of norm.bias in compiled code differs"):
        self_test.run_self_test()


def test_other_flops_than_predicted_are_named(monkeypatch):
    costs = SimpleNamespace(step_flops=lambda trained: 1)
    monkeypatch.setattr(self_test, "backward_costs", lambda model, batch: costs)
    with pytest.raises(GraphContractError, match=r"took \d+ FLOPs where 1 were predicted"):
        self_test.run_self_test()
