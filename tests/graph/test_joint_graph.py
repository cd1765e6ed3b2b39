"""Joint graphs as values: what they say about themselves, and what `verify` refuses."""

import dataclasses

import pytest
import torch
from torch import fx

from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import JointGraph, Parameter, ancestors, verify
from tests.support.graphs import capture_of, text_of
from tests.support.models import POOL

aten = torch.ops.aten


def linear_graph() -> JointGraph:
    """`y = w * x`, its gradient for `w`, and none for `x`."""
    graph = fx.Graph()
    w, x, tangent = (graph.placeholder(name) for name in ("w", "x", "tangent"))
    y = graph.create_node("call_function", aten.mul.Tensor, (w, x), name="y")
    dw = graph.create_node("call_function", aten.mul.Tensor, (tangent, x), name="dw")
    graph.output((y, dw, None))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(2)
    return JointGraph(module=fx.GraphModule({}, graph), forward_outputs=1, slots=("w", "x"))


def test_outputs_are_the_forwards_then_the_gradient_slots():
    joint = linear_graph()
    assert [node and node.name for node in joint.outputs] == ["y", "dw", None]
    assert [node and node.name for node in joint.gradients] == ["dw", None]


def test_live_names_the_inputs_whose_gradient_is_computed():
    assert linear_graph().live == {"w"}


def test_forward_nodes_are_those_a_forward_output_needs():
    joint = linear_graph()
    assert {node.name for node in joint.forward_nodes()} == {"w", "x", "y"}


def test_ancestors_include_the_nodes_themselves_and_shared_inputs_once():
    joint = linear_graph()
    assert {node.name for node in ancestors(node for node in joint.gradients if node)} == {
        "tangent",
        "x",
        "dw",
    }
    assert ancestors([]) == frozenset()


def test_a_copy_has_nodes_and_metadata_of_its_own():
    joint = linear_graph()
    twin = joint.copy()
    assert text_of(twin.module) == text_of(joint.module)
    assert not set(twin.module.graph.nodes) & set(joint.module.graph.nodes)
    twin.outputs[0].meta["val"] = "changed"
    twin.module.graph.output_node().args = ((),)
    assert isinstance(joint.outputs[0].meta["val"], torch.Tensor)
    assert len(joint.outputs) == 3


@pytest.mark.parametrize("recipe", POOL[:2], ids=str)
def test_a_copy_of_a_captured_graph_keeps_names_values_and_meaning(recipe):
    joint = capture_of(recipe)
    twin = joint.copy()
    assert text_of(twin.module) == text_of(joint.module)
    pairs = zip(joint.module.graph.nodes, twin.module.graph.nodes, strict=True)
    assert all(
        a.meta.get("val") is b.meta.get("val") and a.meta.get("desc") == b.meta.get("desc") for a, b in pairs
    )
    assert (twin.slots, twin.live, twin.parameters) == (joint.slots, joint.live, joint.parameters)


def test_a_joint_graph_cannot_be_assigned_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        linear_graph().forward_outputs = 2


def test_a_sound_graph_verifies():
    verify(linear_graph())


def test_a_wrong_number_of_outputs_is_refused():
    joint = dataclasses.replace(linear_graph(), forward_outputs=2)
    with pytest.raises(
        GraphContractError, match="2 forward outputs and 2 gradient slots, the graph has 3 outputs"
    ):
        verify(joint)


def test_a_gradient_of_no_known_input_is_refused():
    joint = dataclasses.replace(linear_graph(), slots=(None, "x"))
    with pytest.raises(GraphContractError, match="dw is a gradient of no known input"):
        verify(joint)


def test_an_operator_without_a_value_is_refused():
    joint = linear_graph()
    del joint.outputs[1].meta["val"]
    with pytest.raises(GraphContractError, match=r"dw .* has no meta\['val'\]"):
        verify(joint)


def test_a_parameter_knows_its_size_and_prints_its_names():
    weight = Parameter(fqn="embed.weight", aliases=("head.weight",), shape=(3, 4), dtype=torch.float32)
    assert weight.numel == 12
    assert weight.status == "selectable"
    assert str(weight) == "embed.weight = head.weight [3, 4]"
    assert str(Parameter(fqn="scale", shape=(), dtype=torch.float32)) == "scale []"


def test_a_joint_graph_prints_its_origin_and_size():
    assert str(linear_graph()) == "joint graph: 6 nodes, 1 gradients"
    assert str(capture_of(POOL[0])).startswith("joint graph (dynamo): ")
