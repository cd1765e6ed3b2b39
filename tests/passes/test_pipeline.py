"""restrict_gradients: the passes together compute what eager autograd computes, and nothing else."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile.costs.backward_costs import costs_of
from gtcompile.graph.joint_graph import ancestors, verify
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.graphs import capture_of, flops_of, run_joint, text_of
from tests.support.models import POOL, RANDOM_LAYERS, trained_sets


@st.composite
def captured(draw, pool=POOL):
    """A recipe, its joint graph, and a set of parameters with a gradient."""
    recipe = draw(st.sampled_from(pool))
    joint = capture_of(recipe)
    return recipe, joint, draw(trained_sets(sorted(joint.live)))


@settings(max_examples=60)
@given(captured([recipe for recipe in POOL if RANDOM_LAYERS.isdisjoint(recipe.layers)]))
def test_the_gradients_left_are_those_of_eager_autograd(case):
    recipe, joint, keep = case
    model = recipe.model()
    expected = reference_gradients(model, recipe.batch(), keep)
    _, gradients = run_joint(restrict_gradients(joint, keep), model, recipe.batch())
    assert_same_gradients(gradients, expected)


@settings(max_examples=60)
@given(captured())
def test_a_restricted_graph_keeps_every_promise(case):
    _, joint, keep = case
    restricted = restrict_gradients(joint, keep)
    verify(restricted)
    assert restricted.live == keep
    assert restricted.provenance == ("drop_gradients", "eliminate_dead_nodes", "narrow_output_masks")
    needed = ancestors([restricted.module.graph.output_node()])
    assert all(n in needed or n.op == "placeholder" or n.is_impure() for n in restricted.module.graph.nodes)


@settings(max_examples=100)
@given(captured())
def test_a_restricted_graph_does_exactly_the_predicted_flops(case):
    _, joint, keep = case
    assert flops_of(restrict_gradients(joint, keep).module.graph.nodes) == costs_of(joint).step_flops(keep)


@settings(max_examples=40)
@given(captured(), st.data())
def test_restricting_step_by_step_is_restricting_at_once(case, data):
    _, joint, keep = case
    fewer = data.draw(trained_sets(sorted(keep)))
    at_once = restrict_gradients(joint, fewer)
    assert text_of(restrict_gradients(restrict_gradients(joint, keep), fewer).module) == text_of(
        at_once.module
    )
    assert text_of(restrict_gradients(at_once, fewer).module) == text_of(at_once.module)


@settings(max_examples=40)
@given(captured())
def test_the_captured_graph_is_never_changed(case):
    _, joint, keep = case
    before = text_of(joint.module)
    restrict_gradients(joint, keep)
    assert text_of(joint.module) == before
