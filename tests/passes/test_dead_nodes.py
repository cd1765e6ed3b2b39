"""eliminate_dead_nodes: what no output needs is gone, the rest is as it was."""

import pytest
import torch
from torch import fx

from gtcompile.capture.capture import capture
from gtcompile.graph.joint_graph import JointGraph, ancestors
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.graphs import operators, run_joint, text_of
from tests.support.models import Recipe, Regression, make_batch

aten = torch.ops.aten


@pytest.fixture
def model():
    return Regression(3)


@pytest.fixture
def joint(model):
    return eliminate_dead_nodes(capture(model, make_batch()))


def by_hand(build) -> JointGraph:
    """A graph over one input `x`; `build(graph, x)` returns its outputs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    outputs = build(graph, x)
    graph.output(tuple(outputs))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(2)
    return JointGraph(module=fx.GraphModule({}, graph), forward_outputs=len(outputs), slots=())


def test_what_only_a_dropped_gradient_needed_is_erased(joint):
    after = eliminate_dead_nodes(drop_gradients(joint, {"layers.2.weight", "layers.2.bias"}))
    # forward: three products; backward: dW of the last layer, no dX
    assert operators(joint.module)[aten.mm.default] == 5
    assert operators(after.module)[aten.mm.default] == 1
    assert operators(after.module)[aten.addmm.default] == 3


def test_a_graph_without_dead_nodes_is_left_alone(joint):
    assert text_of(eliminate_dead_nodes(joint).module) == text_of(joint.module)


def test_nodes_another_gradient_needs_stay(joint):
    upstream = eliminate_dead_nodes(drop_gradients(joint, {"layers.0.bias"}))
    # both dX, no dW: the path to the first layer runs through the others
    assert operators(upstream.module)[aten.mm.default] == 2


def test_a_whole_chain_of_dead_nodes_goes_at_once():
    def build(graph, x):
        kept = dead = graph.call_function(aten.sin.default, (x,))
        for _ in range(5):
            dead = graph.call_function(aten.cos.default, (dead,))
        return [kept]

    assert operators(eliminate_dead_nodes(by_hand(build)).module) == {aten.sin.default: 1}


def test_unused_inputs_stay_inputs(joint):
    after = eliminate_dead_nodes(drop_gradients(joint, frozenset()))
    names = [[n.name for n in j.module.graph.find_nodes(op="placeholder")] for j in (joint, after)]
    assert names[0] == names[1]


def test_random_draws_stay_so_that_later_draws_are_the_same():
    def build(graph, x):
        graph.call_function(aten.bernoulli.p, (graph.call_function(aten.sin.default, (x,)), 0.5))
        graph.call_function(aten.cos.default, (x,))
        return [graph.call_function(aten.bernoulli.p, (x, 0.5))]

    after = operators(eliminate_dead_nodes(by_hand(build)).module)
    assert after == {aten.bernoulli.p: 2, aten.sin.default: 1}


def test_mutations_stay_with_what_they_write():
    def build(graph, x):
        doubled = graph.call_function(aten.mul.Tensor, (x, 2))
        graph.call_function(aten.copy_.default, (x, doubled))
        graph.call_function(aten.cos.default, (doubled,))
        return [graph.call_function(aten.sin.default, (x,))]

    after = operators(eliminate_dead_nodes(by_hand(build)).module)
    assert after == {aten.mul.Tensor: 1, aten.copy_.default: 1, aten.sin.default: 1}


def test_values_stay_the_same(model, joint):
    keep = {"layers.1.weight", "layers.2.bias"}
    after = eliminate_dead_nodes(drop_gradients(joint, keep))
    loss, gradients = run_joint(after, model, make_batch())
    assert_same_gradients(gradients, reference_gradients(model, make_batch(), keep))
    assert loss[0] == model(**make_batch())


def test_every_node_left_reaches_an_output():
    recipe = Recipe(("attention", "branches"))
    joint = capture(recipe.model(), recipe.batch())
    after = eliminate_dead_nodes(drop_gradients(joint, {"layers.1.left.weight"}))
    needed = ancestors([after.module.graph.output_node()])
    assert all(node in needed or node.op == "placeholder" for node in after.module.graph.nodes)


def test_eliminating_twice_is_eliminating_once(joint):
    once = eliminate_dead_nodes(drop_gradients(joint, {"layers.1.bias"}))
    assert text_of(eliminate_dead_nodes(once).module) == text_of(once.module)


def test_the_given_graph_is_untouched(joint):
    dropped = drop_gradients(joint, {"layers.2.weight"})
    before = text_of(dropped.module)
    eliminate_dead_nodes(dropped)
    assert text_of(dropped.module) == before
