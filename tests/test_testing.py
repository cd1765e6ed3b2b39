"""The oracles are right when gradients are right, fail when they are not, and have no side effects."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import POOL, Recipe, Regression, make_batch, selectable, step, trained_sets


def test_reference_gradients_are_those_of_backward():
    model, batch = Regression(3), make_batch()
    reference = reference_gradients(model, batch)
    step(model, batch)
    assert reference.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(reference[name], p.grad) for name, p in model.named_parameters())


@settings(max_examples=20)
@given(st.sampled_from(POOL), st.data())
def test_reference_gradients_are_those_of_requires_grad_toggling(recipe, data):
    model, twin = recipe.model(), recipe.model()
    trained = data.draw(trained_sets(selectable(model)))
    torch.manual_seed(1)
    reference = reference_gradients(model, recipe.batch(), trained)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    torch.manual_seed(1)
    loss = twin(**recipe.batch())
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, reference)


def test_the_trained_set_is_the_default():
    model = Regression(3)
    train_only(model, ["layers.1.*"])
    assert reference_gradients(model, make_batch()).keys() == {"layers.1.weight", "layers.1.bias"}
    assert reference_gradients(model, make_batch(), ["layers.0.bias"]).keys() == {"layers.0.bias"}


def test_parameters_without_influence_have_no_reference():
    model = Recipe(("partly unused",)).model()
    trained = ["layers.0.never_called.weight", "layers.0.linear.weight"]
    assert reference_gradients(model, make_batch(), trained).keys() == {"layers.0.linear.weight"}


def test_a_loss_without_any_of_them_has_no_reference():
    model = Recipe(("partly unused",)).model()
    assert reference_gradients(model, make_batch(), ["layers.0.never_called.weight"]) == {}


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no parameter is called layers.9.bias"):
        reference_gradients(Regression(2), make_batch(), ["layers.9.bias"])


@pytest.mark.parametrize("recipe", POOL, ids=str)
def test_nothing_changes_while_the_reference_is_computed(recipe):
    model, batch = recipe.model(), recipe.batch()
    step(model, batch)
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    asks, random = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    reference_gradients(model, batch, ["embed.bias"])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_same_gradients(model, gradients)
    assert [p.requires_grad for p in model.parameters()] == asks
    assert torch.equal(torch.get_rng_state(), random)


def test_the_next_step_draws_the_dropout_masks_of_the_reference():
    model, batch = Recipe(("dropout", "dropout")).model(), make_batch()
    expected = reference_gradients(model, batch)
    step(model, batch)
    assert_same_gradients(model, expected)


def test_a_compiled_model_runs_eagerly_for_its_reference():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model = Regression(2)
    expected = reference_gradients(model, make_batch())
    assert_same_gradients(reference_gradients(torch.compile(model, backend=refuse), make_batch()), expected)


def test_equal_gradients_pass():
    gradients = reference_gradients(Regression(2), make_batch())
    assert_same_gradients(gradients, dict(gradients))


def test_a_gradient_too_many_is_named():
    gradients = reference_gradients(Regression(2), make_batch())
    fewer = {name: g for name, g in gradients.items() if name != "layers.0.bias"}
    with pytest.raises(AssertionError, match=r"unexpected \['layers.0.bias'\], missing \[\]"):
        assert_same_gradients(gradients, fewer)


def test_a_missing_gradient_is_named():
    model = Regression(2)
    expected = reference_gradients(model, make_batch())
    step(model, make_batch())
    model.layers[1].weight.grad = None
    with pytest.raises(AssertionError, match=r"unexpected \[\], missing \['layers.1.weight'\]"):
        assert_same_gradients(model, expected)


def test_a_wrong_gradient_is_named_and_a_tolerance_can_allow_it():
    expected = reference_gradients(Regression(2), make_batch())
    wrong = dict(expected) | {"layers.1.bias": expected["layers.1.bias"] + 1e-3}
    with pytest.raises(AssertionError, match=r"gradient of layers.1.bias"):
        assert_same_gradients(wrong, expected)
    assert_same_gradients(wrong, expected, atol=2e-3)
    with pytest.raises(AssertionError, match=r"gradient of layers.1.bias"):
        assert_same_gradients(wrong, expected, atol=1e-4)


def test_one_bit_is_a_difference():
    expected = reference_gradients(Regression(2), make_batch())
    nudged = {name: torch.nextafter(g, torch.full_like(g, torch.inf)) for name, g in expected.items()}
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same_gradients(nudged, expected)
