"""narrow_output_masks: multi-output backward operators compute what is read, and no more."""

import functools

import pytest
import torch
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.passes.output_masks import MASKED_OPERATORS, narrow_output_masks
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.graphs import flops_of, run_joint, text_of
from tests.support.models import Stack

aten = torch.ops.aten

LAYERS = {
    aten.native_layer_norm_backward.default: lambda: nn.LayerNorm(8),
    aten.native_group_norm_backward.default: lambda: nn.GroupNorm(2, 6),
    aten.native_batch_norm_backward.default: lambda: nn.BatchNorm1d(6),
    aten.convolution_backward.default: lambda: nn.Conv1d(6, 6, 3, padding=1),
}
"""A layer from (batch, 6, 8) to the same whose backward is the operator."""


def model_with(operator) -> Stack:
    torch.manual_seed(0)
    return Stack([LAYERS[operator]()], tied=False)


def batch() -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)) for name in ("x", "y")}


def masks(joint) -> list[list[bool]]:
    return [list(node.args[-1]) for node in joint.module.graph.nodes if node.target in MASKED_OPERATORS]


@functools.cache
def joint_with(operator) -> JointGraph:
    return capture(model_with(operator), batch())


def narrowed(operator, keep) -> JointGraph:
    return narrow_output_masks(eliminate_dead_nodes(drop_gradients(joint_with(operator), keep)))


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_a_frozen_layer_is_asked_for_its_input_gradient_alone(operator):
    (mask,) = masks(narrowed(operator, {"embed.weight"}))
    assert mask == [True] + [False] * (len(mask) - 1)


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_a_layer_above_a_frozen_prefix_is_asked_for_its_parameters_alone(operator):
    (mask,) = masks(narrowed(operator, {"layers.0.weight"}))
    assert mask == [False, True] + [False] * (len(mask) - 2)


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_a_mask_whose_outputs_are_all_read_is_left_alone(operator):
    joint = eliminate_dead_nodes(joint_with(operator))
    assert text_of(narrow_output_masks(joint).module) == text_of(joint.module)


@pytest.mark.parametrize("operator", LAYERS, ids=str)
@pytest.mark.parametrize("keep", [{"embed.weight"}, {"layers.0.weight"}, {"embed.bias", "layers.0.weight"}])
def test_values_stay_the_same(operator, keep):
    model = model_with(operator)
    expected = reference_gradients(model, batch(), keep)
    outputs, gradients = run_joint(narrowed(operator, keep), model, batch())
    assert_same_gradients(gradients, expected)
    assert outputs[-1] == model(**batch())


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_outputs_nobody_asks_for_have_no_value(operator):
    joint = narrowed(operator, {"embed.weight"})
    (node,) = [n for n in joint.module.graph.nodes if n.target in MASKED_OPERATORS]
    assert [value is not None for value in node.meta["val"]] == list(node.args[-1])


def test_several_operators_are_narrowed_each_by_its_own_readers():
    torch.manual_seed(0)
    model = Stack([nn.LayerNorm(8), nn.LayerNorm(8)], tied=False)
    joint = restrict_gradients(capture(model, batch()), {"layers.0.bias", "layers.1.weight"})
    assert masks(joint) == [
        [True, True, False],
        [False, False, True],
    ]  # the last layer's backward comes first


def test_a_narrowed_convolution_does_fewer_flops():
    keep_all, keep_one = (
        narrowed(aten.convolution_backward.default, keep)
        for keep in ({"embed.weight", "layers.0.weight"}, {"layers.0.weight"})
    )
    convolutions = [
        flops_of(n for n in j.module.graph.nodes if n.target is aten.convolution_backward.default)
        for j in (keep_all, keep_one)
    ]
    assert convolutions[0] == 2 * convolutions[1] > 0


def test_an_operator_whose_tuple_is_read_itself_is_left_alone():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(
        aten.native_layer_norm_backward.default, (x, x, [8], x, x, None, None, [True, True, True])
    )
    graph.output((node,))
    after = narrow_output_masks(fx.GraphModule({}, graph))
    node = after.graph.find_nodes(op="call_function", target=node.target)[0]
    assert node.args[-1] == [True, True, True]


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_narrowing_twice_is_narrowing_once(operator):
    once = narrowed(operator, {"embed.weight"})
    assert text_of(narrow_output_masks(once).module) == text_of(once.module)


@pytest.mark.parametrize("operator", LAYERS, ids=str)
def test_the_given_graph_is_untouched(operator):
    joint = eliminate_dead_nodes(drop_gradients(joint_with(operator), {"embed.weight"}))
    before, values = text_of(joint.module), masks(joint)
    narrow_output_masks(joint)
    assert text_of(joint.module) == before
    assert masks(joint) == values
