"""What the decorators of passes promise, and that they catch edits that break a promise."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from gtcompile.capture.capture import capture
from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import JointGraph, copy_module
from gtcompile.passes.contract import graph_pass, graph_split, interface_pass
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
def change_nothing(joint: JointGraph) -> None:
    """An edit without effect."""


@graph_pass
def double_a_gradient(joint: JointGraph, times: int) -> None:
    """Double the first gradient so many times."""
    graph = joint.graph
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


def test_each_run_logs_one_line(joint, caplog):
    with caplog.at_level(logging.DEBUG, logger="gtcompile.passes.contract"):
        change_nothing(joint)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["change_nothing"]


def test_a_pass_that_adds_an_input_is_caught(joint):
    @graph_pass
    def add_an_input(joint: JointGraph) -> None:
        with joint.graph.inserting_before(next(iter(joint.graph.nodes))):
            joint.graph.placeholder("another")

    with pytest.raises(GraphContractError, match="add_an_input changed the inputs"):
        add_an_input(joint)


def test_a_pass_that_removes_an_input_is_caught(joint):
    @graph_pass
    def remove_a_tangent(joint: JointGraph) -> None:
        tangent = joint.graph.find_nodes(op="placeholder")[-1]
        tangent.replace_all_uses_with(joint.outputs[0])
        joint.graph.erase_node(tangent)

    with pytest.raises(GraphContractError, match="remove_a_tangent changed the inputs"):
        remove_a_tangent(joint)


def test_a_pass_that_drops_a_forward_output_is_caught(joint):
    @graph_pass
    def drop_the_loss(joint: JointGraph) -> None:
        replace_output(joint.graph, 0, None)

    with pytest.raises(GraphContractError, match=r"drop_the_loss changed the forward outputs"):
        drop_the_loss(joint)


def test_a_pass_that_replaces_a_forward_output_is_caught(joint):
    @graph_pass
    def return_another(joint: JointGraph) -> None:
        replace_output(joint.graph, 0, joint.gradients[0])

    with pytest.raises(GraphContractError, match="return_another changed the forward outputs"):
        return_another(joint)


def test_a_pass_that_changes_the_number_of_outputs_is_caught(joint):
    @graph_pass
    def shorten(joint: JointGraph) -> None:
        joint.graph.output_node().args = (joint.outputs[:-1],)

    with pytest.raises(GraphContractError, match="the graph has"):
        shorten(joint)


def test_a_pass_that_invents_a_gradient_is_caught(joint):
    slot = joint.slots.index("layers.0.weight")

    @graph_pass
    def drop_one(joint: JointGraph) -> None:
        replace_output(joint.graph, joint.forward_outputs + slot, None)

    @graph_pass
    def invent(joint: JointGraph) -> None:
        other = next(g for g in joint.gradients if g is not None)
        replace_output(joint.graph, joint.forward_outputs + slot, other)

    with pytest.raises(GraphContractError, match="invent fills outputs that were None:"):
        invent(drop_one(joint))


def test_a_pass_that_gives_an_input_without_slot_a_gradient_is_caught(joint):
    slot = joint.slots.index(None)

    @graph_pass
    def differentiate_the_batch(joint: JointGraph) -> None:
        replace_output(joint.graph, joint.forward_outputs + slot, joint.gradients[0])

    with pytest.raises(GraphContractError, match="a gradient of no known input"):
        differentiate_the_batch(joint)


def test_a_pass_that_adds_a_node_without_a_value_is_caught(joint):
    @graph_pass
    def forget_the_value(joint: JointGraph) -> None:
        gradient = joint.gradients[0]
        with joint.graph.inserting_after(gradient):
            doubled = joint.graph.call_function(aten.mul.Tensor, (gradient, 2))
        replace_output(joint.graph, joint.forward_outputs, doubled)

    with pytest.raises(GraphContractError, match=r"has no meta\['val'\]"):
        forget_the_value(joint)


def test_a_broken_graph_is_refused_before_the_pass_runs(joint):
    broken = joint.copy()
    broken.module.graph.output_node().args = (joint.copy().outputs[:-1],)
    ran = []

    @graph_pass
    def note(joint: JointGraph) -> None:
        ran.append(True)

    with pytest.raises(GraphContractError):
        note(broken)
    assert not ran


def backward() -> fx.GraphModule:
    """A graph without names: `(w, x, dy) -> (dy @ w, dy.t() @ x)`."""
    values = [torch.randn(3, 3) for _ in range(3)]
    return make_fx(lambda w, x, dy: (dy @ w, dy.t() @ x), tracing_mode="fake")(*values)


def test_a_pass_takes_a_graph_without_names_and_returns_one():
    @graph_pass
    def drop_the_first(module: fx.GraphModule) -> None:
        replace_output(module.graph, 0, None)

    given = backward()
    text, after = text_of(given), drop_the_first(given)
    assert isinstance(after, fx.GraphModule)
    assert text_of(given) == text
    inputs = random_inputs(given)
    first, second = run_graph(after, inputs)
    assert first is None
    assert torch.equal(second, run_graph(given, inputs)[1])


def test_a_value_that_gets_lost_in_a_graph_without_names_is_caught():
    @graph_pass
    def lose_a_value(module: fx.GraphModule) -> None:
        del module.graph.find_nodes(op="call_function", target=aten.mm.default)[0].meta["val"]

    with pytest.raises(GraphContractError, match=r"lose_a_value left calls without meta\['val'\]: mm"):
        lose_a_value(backward())


def test_a_graph_that_reads_a_value_before_it_is_computed_is_caught():
    @graph_pass
    def turn_around(module: fx.GraphModule) -> None:
        first, second = module.graph.find_nodes(op="call_function", target=aten.mm.default)
        first.args = (second, first.args[1])

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        turn_around(backward())


def test_a_pass_may_change_of_its_interface_what_it_declares_and_nothing_else():
    def edit(module: fx.GraphModule) -> None:
        module.graph.erase_node(next(n for n in module.graph.nodes if not n.users and n.op == "placeholder"))

    without_input = drop_dead(backward())
    with pytest.raises(GraphContractError, match="edit changed the inputs"):
        graph_pass(edit)(without_input)
    with pytest.raises(GraphContractError, match="edit changed the inputs"):
        interface_pass("names", "outputs")(edit)(without_input)
    assert len(interface_pass("inputs")(edit)(without_input).graph.find_nodes(op="placeholder")) == 2


@interface_pass("outputs")
def drop_dead(module: fx.GraphModule) -> None:
    """Return the first output alone."""
    output = module.graph.output_node()
    output.args = (output.args[0][:1],)
    module.graph.eliminate_dead_code()


def test_an_output_may_not_be_added_by_a_pass_that_changes_outputs():
    @interface_pass("outputs")
    def return_one_more(module: fx.GraphModule) -> None:
        output = module.graph.output_node()
        output.args = ((*output.args[0], output.args[0][0]),)

    with pytest.raises(GraphContractError, match="return_one_more added outputs: 2 became 3"):
        return_one_more(backward())


@dataclass
class Halves:
    """Two graphs that should compute the outputs of one."""

    modules: tuple[fx.GraphModule, ...]
    finished: tuple[int, ...]


def half(module: fx.GraphModule, position: int) -> fx.GraphModule:
    """A graph that returns one output of another."""
    twin = copy_module(module)
    output = twin.graph.output_node()
    output.args = ((output.args[0][position],),)
    twin.graph.eliminate_dead_code()
    return twin


def test_a_split_into_parts_that_compute_everything_once_is_returned():
    @graph_split
    def halves(module: fx.GraphModule) -> Halves:
        return Halves((half(module, 0), half(module, 1)), (0, 1))

    assert halves(backward()).finished == (0, 1)


@pytest.mark.parametrize(
    ("positions", "finished", "message"),
    [((0, 0), (0, 1), "repeats in several parts: mm"), ((0, 1), (0, 0), "computes twice the outputs: 0")],
)
def test_a_split_that_does_something_twice_is_caught(positions, finished, message):
    @graph_split
    def halves(module: fx.GraphModule) -> Halves:
        return Halves(tuple(half(module, position) for position in positions), finished)

    with pytest.raises(GraphContractError, match=f"halves {message}"):
        halves(backward())


def test_a_split_that_changes_what_it_is_given_is_caught():
    @graph_split
    def halves(module: fx.GraphModule) -> Halves:
        replace_output(module.graph, 0, None)
        return Halves((), ())

    with pytest.raises(GraphContractError, match="halves changed the graph it was given"):
        halves(backward())


def test_a_split_with_a_call_of_its_own_is_caught():
    @graph_split
    def halves(module: fx.GraphModule) -> Halves:
        part = half(module, 0)
        (node,) = part.graph.find_nodes(op="call_function", target=aten.mm.default)
        node.name = "product"
        return Halves((part,), (0,))

    with pytest.raises(GraphContractError, match="halves created calls that the given graph lacks: product"):
        halves(backward())
