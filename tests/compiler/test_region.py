"""Regions: the variant for what is trained now, several calls in flight, and what surrounds a step."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from gtcompile import GraphContractError, compile_blocks, train_only
from gtcompile.compiler import region, specialized
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import Recipe, Regression, captures, make_batch, random_sets, selectable, step

VARIANTS = pytest.mark.parametrize("variants", ["specialized", "hoisted"])


def compiled(model, **options):
    return torch.compile(model, backend="gtcompile", options={"compiler": "eager"} | options)


@pytest.fixture
def compilations(monkeypatch) -> list[frozenset[int]]:
    """The live inputs of every variant that is compiled."""
    seen = []
    compile_specialized = specialized.compile_specialized

    def note(captured, partitioner):
        seen.append(partitioner.live)
        return compile_specialized(captured, partitioner)

    monkeypatch.setattr(specialized, "compile_specialized", note)
    return seen


def test_an_earlier_set_comes_back_without_a_compilation(compilations):
    model, batch = Regression(4), make_batch()
    run = compiled(model)
    sets = random_sets(selectable(model), 5)
    for trained in sets + sets[::-1] + sets:
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
    assert len(compilations) == len(set(compilations)) == 5
    assert captures() == 1


def test_no_more_variants_are_kept_than_asked_and_the_least_recently_used_goes(compilations):
    model, batch = Regression(4), make_batch()
    run = compiled(model, variants_kept=2)
    first, second, third = random_sets(selectable(model), 3)
    expected_compilations = 0
    for trained, is_new in [
        (first, True),
        (second, True),
        (first, False),
        (third, True),  # drops the second
        (first, False),
        (second, True),  # drops the third
        (first, False),
        (third, True),
    ]:
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
        expected_compilations += is_new
        assert len(compilations) == expected_compilations
    assert captures() == 1


def alive(kind: type) -> list[Any]:
    """The objects of a class that nothing has set free."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]


def test_a_dropped_variant_is_set_free():
    others = alive(specialized.SpecializedVariants)
    model, batch = Regression(3), make_batch()
    run = compiled(model, variants_kept=1)
    sets = random_sets(selectable(model), 4)
    kept = []
    for trained in sets:
        train_only(run, trained)
        step(run, batch)
        variants = [v for v in alive(specialized.SpecializedVariants) if v not in others]
        kept.append([v.kept for v in variants if v.kept])
    assert kept == [[1]] * 4


def test_hoisted_variants_never_compile_for_a_set(compilations):
    model, batch = Regression(4), make_batch()
    run = compiled(model, variants="hoisted")
    for trained in random_sets(selectable(model), 6):
        train_only(run, trained)
        step(run, batch)
    assert compilations == []
    assert captures() == 1


@VARIANTS
def test_passes_without_gradients_in_between_change_nothing(variants):
    recipe = Recipe(("dropout", "convolution"))
    model, batch = recipe.model(), recipe.batch()
    run = compiled(model, variants=variants)
    for trained in random_sets(selectable(model), 4):
        train_only(run, trained)
        model.eval()
        with torch.no_grad():
            loss = run(**batch)
        assert not loss.requires_grad
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            assert torch.equal(loss, run(**batch))
        model.train()
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
    assert captures() == 2  # one for training, one for evaluation


@VARIANTS
def test_inference_mode_works(variants):
    model, batch = Regression(2), make_batch()
    with torch.inference_mode():
        loss = compiled(model, variants=variants)(**batch)
    assert torch.equal(loss, model(**batch).detach())


@VARIANTS
def test_user_frozen_and_unused_parameters_get_no_gradient(variants):
    model, batch = Recipe(("partly unused", "norm")).model(), make_batch()
    run = compiled(model, variants=variants)
    for trained in (None, ["layers.0.*"], ["layers.0.never_called.*", "head.bias"]):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
        assert model.layers[0].scale.grad is None
        assert model.layers[0].never_called.weight.grad is None


@VARIANTS
def test_a_set_that_cannot_reach_the_loss_gives_a_loss_without_gradient(variants):
    model, batch = Recipe(("partly unused",)).model(), make_batch()
    run = compiled(model, variants=variants)
    step(run, batch)
    train_only(run, ["layers.0.never_called.*"])
    assert not run(**batch).requires_grad
    train_only(run, ["head.bias"])
    assert run(**batch).requires_grad


class TwoOutputs(nn.Module):
    """Two results of which each depends on a layer of its own, and an input handed through."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.left(x), self.right(x), x


@VARIANTS
@pytest.mark.parametrize(
    ("trained", "names"),
    [
        (["left.*"], {"left.weight", "left.bias"}),
        (["right.bias"], {"right.bias"}),
        (["*.bias"], {"left.bias", "right.bias"}),
    ],
)
def test_an_output_that_depends_on_nothing_trained_ends_the_backward(variants, trained, names):
    model, x = TwoOutputs(), torch.randn(3, 4)
    run = compiled(model, variants=variants)
    train_only(run, trained)
    left, right, _ = run(x)
    assert left.requires_grad == any(name.startswith("left") for name in names)
    assert right.requires_grad == any(name.startswith("right") for name in names)
    sum(output.sum() for output in (left, right)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names


@VARIANTS
def test_gradients_reach_what_lies_before_the_region(variants):
    before, model = nn.Linear(8, 8), Regression(2)
    run = compiled(model, variants=variants)
    batch = make_batch()
    train_only(run, ["layers.1.bias"])
    gradients = []
    for call in (model, run):
        before.zero_grad(set_to_none=True)
        call(before(batch["x"]), batch["y"]).backward()
        gradients.append([p.grad.clone() for p in before.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_variant_that_hands_out_a_frozen_gradient_is_caught(monkeypatch):
    def ignore_the_set(captured, partitioner):
        partitioner.live = frozenset(captured.parameters)
        return compile_specialized(captured, partitioner)

    compile_specialized = specialized.compile_specialized
    monkeypatch.setattr(specialized, "compile_specialized", ignore_the_set)
    model, batch = Regression(2), make_batch()
    run = compiled(model)
    train_only(run, ["layers.1.weight"])
    loss = run(**batch)
    with pytest.raises(GraphContractError, match=r"frozen parameter at input \d+ of a region got a gradient"):
        loss.backward()


def test_the_check_of_a_variant_runs_once(monkeypatch):
    checks = []
    expect_gradients = region.expect_gradients
    monkeypatch.setattr(region, "expect_gradients", lambda *a: checks.append(a[2]) or expect_gradients(*a))
    model, batch = Regression(2), make_batch()
    run = compiled(model)
    for trained in (["layers.1.*"], ["layers.0.*"], ["layers.1.*"]):
        train_only(run, trained)
        step(run, batch)
        step(run, batch)
    assert len(checks) == 2


@VARIANTS
def test_a_compiled_model_can_be_set_free(variants):
    model = Regression(2)
    step(compiled(model, variants=variants), make_batch())
    weight = weakref.ref(model.layers[0].weight)
    del model
    torch.compiler.reset()
    gc.collect()
    assert weight() is None


@VARIANTS
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_block_in_which_nothing_is_trained_runs_without_autograd(variants, compiler):
    model, batch = Recipe(("residual",) * 3).model(), make_batch()
    compile_blocks(model, variants=variants, compiler=compiler)
    train_only(model, ["head.*"])
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        hidden = model.layers[0](batch["x"])
        assert not hidden.requires_grad
        assert saved == []
    step(model, batch)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }


def test_what_a_region_remembers_is_bounded(monkeypatch):
    monkeypatch.setattr(region, "LIVE_SETS_KEPT", 3)
    others = alive(region.Region)
    model, batch = Regression(4), make_batch()
    run = compiled(model, variants="hoisted")
    for trained in random_sets(selectable(model), 8):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
    remembered = [r for r in alive(region.Region) if r not in others and r._ends_of]
    assert [len(region._ends_of) for region in remembered] == [3]


def test_a_parameter_at_the_address_of_a_frozen_one_that_it_replaces_is_frozen():
    model, batch = Recipe(("norm",)).model(), make_batch()
    compile_blocks(model, blocks=["layers.0"], compiler="eager")
    train_only(model, ["head.weight", "layers.0.norm.weight"])
    step(model, batch)
    linear = model.layers[0].linear
    place, values = id(linear.weight), linear.weight.detach().clone()
    linear.weight = None
    gc.collect()
    others = [nn.Parameter(values.clone())]
    while id(others[-1]) != place and len(others) < 10_000:
        others.append(nn.Parameter(values.clone()))
    linear.weight = others[-1]
    assert id(linear.weight) == place
    expected = reference_gradients(model, batch)
    step(model, batch)
    assert expected.keys() == {"head.weight", "layers.0.norm.weight"}
    assert_same_gradients(model, expected)


@VARIANTS
def test_from_the_second_step_on_autograd_does_not_visit_frozen_parameters(variants):
    model, batch = Regression(3), make_batch()
    run = compiled(model, variants=variants)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {"layers.1.weight", "layers.2.bias"}
    train_only(run, trained)
    step(run, batch)
    todo, visited = [run(**batch).grad_fn], set()
    while todo:
        node = todo.pop()
        visited |= {names[id(node.variable)]} if hasattr(node, "variable") else set()
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert visited == trained
