"""The backend on random models and trained sets: gradients, loss and FLOPs are those of eager freezing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile import CaptureError, CompileOptions, backward_costs, compile_blocks, train_only
from gtcompile.compiler import region
from gtcompile.compiler.options import parse_options
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import (
    RANDOM_LAYERS,
    Recipe,
    Regression,
    captures,
    counted_step,
    forget_captures,
    make_batch,
    random_sets,
    recipes,
    selectable,
    step,
)

VARIANTS = ("specialized", "hoisted")


def compiled(model, **options):
    return torch.compile(model, backend="gtcompile", options=options)


def eager_loss(recipe: Recipe, trained: frozenset[str]) -> torch.Tensor:
    """The loss of an eager twin with exactly these asking for a gradient; draws what the next step draws."""
    twin = recipe.model()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    with torch.random.fork_rng(devices=[]):
        return twin(**recipe.batch()).detach()


@settings(max_examples=8)
@given(recipes(layers=3), st.sampled_from(VARIANTS), st.integers(0, 99))
def test_gradients_loss_and_flops_are_those_of_eager_freezing(recipe, variants, seed):
    forget_captures()
    model, batch = recipe.model(), recipe.batch()
    costs = backward_costs(model, batch)
    run, before = compiled(model, compiler="eager", variants=variants), captures()
    for trained in random_sets(sorted(costs.fqns), 3, seed):
        train_only(run, trained)
        expected, expected_loss = reference_gradients(run, batch), eager_loss(recipe, trained)
        assert torch.equal(step(run, batch), expected_loss)
        assert_same_gradients(run, expected)
        assert counted_step(run, batch) == costs.step_flops(trained)
    assert captures() == before + 1


class Twice(Regression):
    """Applies one layer twice to the same."""

    def forward(self, x, y):
        first = self.layers[0]
        return super().forward(torch.tanh(first(x)) * first(x), y)


class TwiceForItsValue(Regression):
    """Computes a layer that it trains a second time, for a term of the loss that trains nothing."""

    def forward(self, x, y):
        return super().forward(x, y) + self.layers[0](x).detach().square().mean()


@pytest.mark.parametrize("variants", VARIANTS)
def test_a_product_computed_again_for_the_forward_alone_is_predicted_as_it_runs(variants):
    model, batch = TwiceForItsValue(3), make_batch()
    run = compiled(model, compiler="eager", variants=variants)
    costs = backward_costs(run, batch)
    for trained in random_sets(sorted(costs.fqns), 3):
        train_only(run, trained)
        step(run, batch)
        assert counted_step(run, batch) == costs.step_flops(trained)


@pytest.mark.slow
@pytest.mark.parametrize("variants", VARIANTS)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_model_computes_twice_is_predicted_and_run_once(variants, in_place):
    model, batch = Twice(3), make_batch()
    eager, options = backward_costs(model, batch), {"compiler": "eager", "variants": variants}
    if in_place:
        model.compile(backend="gtcompile", options=options)
    run = model if in_place else compiled(model, **options)
    costs = backward_costs(run, batch)
    assert costs.forward_flops < eager.forward_flops
    for trained in random_sets(sorted(costs.fqns), 3):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
        assert counted_step(run, batch) == costs.step_flops(trained)


@pytest.mark.parametrize("variants", VARIANTS)
def test_gradients_and_loss_are_those_of_eager_freezing_with_generated_code(variants):
    recipe = Recipe(("norm", "branches"), tied=True)
    model, batch = recipe.model(), recipe.batch()
    run = compiled(model, compiler="inductor", variants=variants)
    for trained in random_sets(selectable(model), 2, 3):
        train_only(run, trained)
        expected, expected_loss = reference_gradients(run, batch), eager_loss(recipe, trained)
        torch.testing.assert_close(step(run, batch), expected_loss, rtol=1e-4, atol=1e-6)
        assert_same_gradients(run, expected, rtol=1e-4, atol=1e-6)
    assert captures() == 1


@pytest.mark.long
@settings(max_examples=8)
@given(recipes(layers=3, without=RANDOM_LAYERS), st.sampled_from(VARIANTS), st.integers(0, 99))
def test_gradients_of_generated_code_are_those_of_eager_freezing_on_random_models(recipe, variants, seed):
    forget_captures()
    model = recipe.model()
    run = compiled(model, compiler="inductor", variants=variants)
    for trained in random_sets(sorted(backward_costs(model, recipe.batch()).fqns), 2, seed):
        train_only(run, trained)
        expected = reference_gradients(model, recipe.batch())
        step(run, recipe.batch())
        assert_same_gradients(run, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variants", VARIANTS)
def test_another_batch_size_is_captured_with_dynamic_shapes_and_trained_right(variants):
    model = Regression(3)
    run = compiled(model, compiler="eager", variants=variants)
    for rows, trained in zip((2, 3, 5, 7), random_sets(selectable(model), 4), strict=True):
        batch = make_batch(rows, rows, 8)
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
    assert captures() == 2


@pytest.mark.parametrize("variants", VARIANTS)
def test_autocast_is_respected(variants):
    recipe = Recipe(("norm", "residual"))
    model, batch = recipe.model(), recipe.batch()
    run = compiled(model, compiler="eager", variants=variants)
    with torch.autocast("cpu", torch.bfloat16):
        for trained in random_sets(selectable(model), 3):
            train_only(run, trained)
            expected = reference_gradients(run, batch)
            step(run, batch)
            assert_same_gradients(run, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compiler": "xla"}, r"option compiler='xla': expected one of 'inductor', 'eager'"),
        ({"variants": "both"}, r"option variants='both': expected one of 'specialized', 'hoisted'"),
        ({"cut_chains": None}, r"option cut_chains=None: expected one of 'run', 'compile'"),
        ({"variants_kept": 0}, r"option variants_kept=0: expected a whole number of at least 1"),
        ({"activation_memory_budget": 1.5}, r"activation_memory_budget=1.5: expected a fraction from 0 to 1"),
        ({"activation_memory_budget": "half"}, r"activation_memory_budget=.half.: expected a fraction"),
        ({"variants_kept": "many"}, r"option variants_kept='many': expected a whole number"),
        (
            {"compilers": "eager", "x": 1},
            r"unknown option 'compilers', 'x'; known are .*compiler.*variants_kept",
        ),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(options)


def test_no_options_are_the_defaults():
    assert parse_options({}) == CompileOptions()
    assert parse_options({"variants": "hoisted"}) == CompileOptions(variants="hoisted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"compiler": "xla"}}, r"option compiler='xla': expected one of 'inductor', 'eager'"),
        ({"options": {"specialize": "beside"}}, r"unknown option 'specialize'; known are activation_memory"),
        (
            {"mode": "reduce-overhead"},
            r"torch\.compile\(\.\.\., mode='reduce-overhead'\) has no meaning for backend=\"gtcompile\"; "
            r"use options=\{\.\.\.\} with the fields of gtcompile\.CompileOptions instead",
        ),
    ],
    ids=str,
)
def test_a_wrong_argument_of_torch_compile_is_refused_as_compile_blocks_refuses_it(arguments, message):
    run = torch.compile(Regression(2), backend="gtcompile", **arguments)
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        step(run, make_batch())
    assert "raised" not in str(refused.value)


def test_an_error_of_compilation_names_the_backend_that_the_user_knows(monkeypatch):
    def fail(*_):
        raise CaptureError("no such graph")

    monkeypatch.setattr(region, "captured_region", fail)
    model = compile_blocks(Regression(2), blocks=["layers.0"])
    with pytest.raises(Exception, match=r"backend='gtcompile' raised:\nCaptureError: no such graph"):
        step(model, make_batch())


CACHED_STEPS = """
import sys
import torch
from torch._dynamo.utils import counters
from gtcompile.testing import assert_same_gradients, reference_gradients
from gtcompile import train_only

variants, *sets = sys.argv[1:]
torch.manual_seed(0)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return ((x - y) ** 2).mean()

model = Model()
batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 8)}
compiled = torch.compile(model, backend="gtcompile", options={"variants": variants})
for patterns in sets:
    train_only(compiled, patterns.split(","))
    expected = reference_gradients(compiled, batch)
    model.zero_grad(set_to_none=True)
    compiled(**batch).backward()
    assert_same_gradients(compiled, expected, rtol=1e-4, atol=1e-6)
hits, misses = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
autograd_hits = counters["aot_autograd"]["autograd_cache_hit"]
print("cache", hits + autograd_hits, misses)
"""


def run_with_cache(folder: Path, variants: str, *sets: str) -> tuple[int, int]:
    """Steps in a fresh process; how often compiled code was found in the cache, and not found."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED_STEPS, variants, *sets], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cache")]
    hits, misses = map(int, line.split()[1:])
    return hits, misses


@pytest.mark.long
@pytest.mark.parametrize("variants", VARIANTS)
def test_processes_that_share_a_disk_cache_never_get_code_of_another_set(tmp_path, variants):
    first, second = "layers.0.*", "layers.2.bias,layers.1.weight"
    assert run_with_cache(tmp_path, variants, first)[1] > 0
    run_with_cache(tmp_path, variants, second)  # its gradients are checked in there
    for again in ([first], [second], [second, first]):
        hits, misses = run_with_cache(tmp_path, variants, *again)
        assert hits > 0
        assert misses == 0
