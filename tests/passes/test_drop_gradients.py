"""drop_gradients: gradient slots to None, and nothing else."""

import pytest

from gtcompile.capture.capture import capture
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.graphs import run_joint, text_of
from tests.support.models import Recipe, Regression, make_batch


@pytest.fixture
def model():
    return Regression(3)


@pytest.fixture
def joint(model):
    return capture(model, make_batch())


def test_slots_outside_keep_become_none(joint):
    after = drop_gradients(joint, {"layers.1.weight"})
    live = [slot for slot, gradient in zip(after.slots, after.gradients, strict=True) if gradient is not None]
    assert live == ["layers.1.weight"]
    assert after.slots == joint.slots


def test_a_graph_whose_gradients_are_all_kept_is_left_alone(joint):
    assert text_of(drop_gradients(joint, joint.live).module) == text_of(joint.module)


def test_names_without_a_gradient_change_nothing(joint):
    kept = drop_gradients(joint, {"layers.1.weight", "no such parameter"})
    assert text_of(kept.module) == text_of(drop_gradients(joint, {"layers.1.weight"}).module)


def test_nothing_kept_leaves_the_forward_alone(model, joint):
    outputs, gradients = run_joint(drop_gradients(joint, frozenset()), model, make_batch())
    assert gradients == {}
    assert outputs[0] == model(**make_batch())


def test_the_nodes_stay_for_the_next_pass(joint):
    after = drop_gradients(joint, {"layers.2.weight"})
    names = [[node.name for node in j.module.graph.nodes] for j in (joint, after)]
    assert names[0] == names[1]


def test_kept_gradients_keep_their_values(model, joint):
    keep = {"layers.0.bias", "layers.2.weight"}
    loss, gradients = run_joint(drop_gradients(joint, keep), model, make_batch())
    assert_same_gradients(gradients, reference_gradients(model, make_batch(), keep))
    assert loss[0] == model(**make_batch())


def test_both_slots_of_a_module_with_two_names_are_dropped_together():
    recipe = Recipe(("residual",), shared=True)
    joint = capture(recipe.model(), recipe.batch())
    assert joint.slots.count("layers.0.up.weight") == 2
    after = drop_gradients(joint, joint.live - {"layers.0.up.weight"})
    assert after.live == joint.live - {"layers.0.up.weight"}


def test_dropping_twice_is_dropping_once(joint):
    keep = {"layers.0.weight"}
    once = drop_gradients(joint, keep)
    assert text_of(drop_gradients(once, keep).module) == text_of(once.module)


def test_dropping_in_a_chain_keeps_what_all_keep(joint):
    first = drop_gradients(joint, {"layers.0.weight", "layers.1.weight"})
    assert drop_gradients(first, {"layers.1.weight", "layers.2.weight"}).live == {"layers.1.weight"}


def test_the_given_graph_is_untouched(joint):
    before, live = text_of(joint.module), joint.live
    drop_gradients(joint, frozenset())
    assert text_of(joint.module) == before
    assert joint.live == live
