"""What `@graph_pass` promises, and that it catches edits that break the promise."""

import logging

import pytest
import torch
from torch import fx

from gtcompile.capture.capture import capture
from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.contract import graph_pass
from tests.support.graphs import random_inputs, run_graph, text_of
from tests.support.models import Regression, make_batch

aten = torch.ops.aten


@pytest.fixture(scope="module")
def joint() -> JointGraph:
    return capture(Regression(2), make_batch())


def replace_output(graph: fx.Graph, position: int, node: fx.Node | None) -> None:
    output = graph.output_node()
    outputs = list(output.args[0])
    outputs[position] = node
    output.args = (tuple(outputs),)


@graph_pass
def change_nothing(graph: fx.Graph, joint: JointGraph) -> None:
    """An edit without effect."""


@graph_pass
def double_a_gradient(graph: fx.Graph, joint: JointGraph, times: int) -> None:
    """Double the first gradient so many times."""
    for _ in range(times):
        gradient = joint.gradients[0]
        with graph.inserting_after(gradient):
            doubled = graph.call_function(aten.mul.Tensor, (gradient, 2))
        doubled.meta["val"] = gradient.meta["val"]
        replace_output(graph, joint.forward_outputs, doubled)


def test_the_given_graph_is_left_as_it_was(joint):
    before = text_of(joint.module)
    after = double_a_gradient(joint, times=1)
    assert text_of(joint.module) == before
    assert text_of(after.module) != before


def test_a_pass_gets_its_arguments_and_its_result_runs(joint):
    once, twice = double_a_gradient(joint, 1), double_a_gradient(joint, times=2)
    inputs = random_inputs(joint.module)
    gradient, doubled, quadrupled = (
        run_graph(j.module, inputs)[joint.forward_outputs] for j in (joint, once, twice)
    )
    assert torch.equal(doubled, 2 * gradient)
    assert torch.equal(quadrupled, 4 * gradient)


def test_the_result_says_which_passes_made_it(joint):
    assert change_nothing(double_a_gradient(joint, 1)).provenance == ("double_a_gradient", "change_nothing")


def test_a_pass_keeps_its_name_and_docstring():
    assert change_nothing.__name__ == "change_nothing"
    assert change_nothing.__doc__ == "An edit without effect."


def test_each_run_logs_one_line(joint, caplog):
    with caplog.at_level(logging.DEBUG, logger="gtcompile.passes.contract"):
        change_nothing(joint)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["change_nothing"]


def test_a_pass_that_adds_an_input_is_caught(joint):
    @graph_pass
    def add_an_input(graph: fx.Graph, joint: JointGraph) -> None:
        with graph.inserting_before(next(iter(graph.nodes))):
            graph.placeholder("another")

    with pytest.raises(GraphContractError, match="add_an_input changed the inputs"):
        add_an_input(joint)


def test_a_pass_that_removes_an_input_is_caught(joint):
    @graph_pass
    def remove_a_tangent(graph: fx.Graph, joint: JointGraph) -> None:
        tangent = graph.find_nodes(op="placeholder")[-1]
        tangent.replace_all_uses_with(joint.outputs[0])
        graph.erase_node(tangent)

    with pytest.raises(GraphContractError, match="remove_a_tangent changed the inputs"):
        remove_a_tangent(joint)


def test_a_pass_that_drops_a_forward_output_is_caught(joint):
    @graph_pass
    def drop_the_loss(graph: fx.Graph, joint: JointGraph) -> None:
        replace_output(graph, 0, None)

    with pytest.raises(GraphContractError, match=r"drop_the_loss changed the forward outputs"):
        drop_the_loss(joint)


def test_a_pass_that_replaces_a_forward_output_is_caught(joint):
    @graph_pass
    def return_another(graph: fx.Graph, joint: JointGraph) -> None:
        replace_output(graph, 0, joint.gradients[0])

    with pytest.raises(GraphContractError, match="return_another changed the forward outputs"):
        return_another(joint)


def test_a_pass_that_changes_the_number_of_outputs_is_caught(joint):
    @graph_pass
    def shorten(graph: fx.Graph, joint: JointGraph) -> None:
        graph.output_node().args = (joint.outputs[:-1],)

    with pytest.raises(GraphContractError, match="the graph has"):
        shorten(joint)


def test_a_pass_that_invents_a_gradient_is_caught(joint):
    slot = joint.slots.index("layers.0.weight")

    @graph_pass
    def drop_one(graph: fx.Graph, joint: JointGraph) -> None:
        replace_output(graph, joint.forward_outputs + slot, None)

    @graph_pass
    def invent(graph: fx.Graph, joint: JointGraph) -> None:
        other = next(g for g in joint.gradients if g is not None)
        replace_output(graph, joint.forward_outputs + slot, other)

    with pytest.raises(GraphContractError, match=r"invent made gradients nobody had: \['layers.0.weight'\]"):
        invent(drop_one(joint))


def test_a_pass_that_gives_an_input_without_slot_a_gradient_is_caught(joint):
    slot = joint.slots.index(None)

    @graph_pass
    def differentiate_the_batch(graph: fx.Graph, joint: JointGraph) -> None:
        replace_output(graph, joint.forward_outputs + slot, joint.gradients[0])

    with pytest.raises(GraphContractError, match="a gradient of no known input"):
        differentiate_the_batch(joint)


def test_a_pass_that_adds_a_node_without_a_value_is_caught(joint):
    @graph_pass
    def forget_the_value(graph: fx.Graph, joint: JointGraph) -> None:
        gradient = joint.gradients[0]
        with graph.inserting_after(gradient):
            doubled = graph.call_function(aten.mul.Tensor, (gradient, 2))
        replace_output(graph, joint.forward_outputs, doubled)

    with pytest.raises(GraphContractError, match=r"has no meta\['val'\]"):
        forget_the_value(joint)


def test_a_broken_graph_is_refused_before_the_pass_runs(joint):
    broken = joint.copy()
    broken.module.graph.output_node().args = (joint.copy().outputs[:-1],)
    ran = []

    @graph_pass
    def note(graph: fx.Graph, joint: JointGraph) -> None:
        ran.append(True)

    with pytest.raises(GraphContractError):
        note(broken)
    assert not ran
