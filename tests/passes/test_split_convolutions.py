"""split_convolutions: each gradient of a convolution by itself, the weight's a leaf."""

import functools
from operator import getitem

import pytest
import torch
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.hoisting import hoist_weight_gradients
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.passes.split_convolutions import split_convolutions
from tests.support.graphs import backward_of, flops_of, random_inputs, run_graph, text_of
from tests.support.models import Stack

aten = torch.ops.aten

CONVOLUTIONS = {
    "plain": lambda: nn.Conv1d(6, 6, 3, padding=1),
    "without a bias": lambda: nn.Conv1d(6, 6, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv1d(6, 6, 3, padding=1, groups=3),
    "dilated": lambda: nn.Conv1d(6, 6, 3, padding=2, dilation=2),
    "transposed": lambda: nn.ConvTranspose1d(6, 6, 3, padding=1),
    "two in a row": lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.Tanh(), nn.Conv1d(6, 6, 1)),
    "planes": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(1, 2)),
}
"""Layers from (batch, 6, 8) to the same."""


@functools.cache
def joint_with(kind: str) -> JointGraph:
    """A layer between linear ones."""
    torch.manual_seed(0)
    batch = {name: torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)) for name in ("x", "y")}
    return capture(Stack([CONVOLUTIONS[kind]()], tied=False), batch)


def split_backward(joint: JointGraph) -> fx.GraphModule:
    return split_convolutions(backward_of(joint))


def masks(backward: fx.GraphModule) -> list[list[bool]]:
    nodes = backward.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return [list(node.args[-1]) for node in nodes]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_convolution_node_computes_one_gradient(kind):
    whole, split = backward_of(joint_with(kind)), split_backward(joint_with(kind))
    assert all(sum(mask) > 1 for mask in masks(whole))
    assert sorted(masks(split)) == sorted([[True, False, False], [False, True, False]] * len(masks(whole)))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_values_and_flops_stay_the_same(kind):
    whole, split = backward_of(joint_with(kind)), split_backward(joint_with(kind))
    inputs = random_inputs(whole)
    for ours, theirs in zip(run_graph(split, inputs), run_graph(whole, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert flops_of(split.graph.nodes) == flops_of(whole.graph.nodes)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_weight_gradient_becomes_a_leaf(kind):
    joint = joint_with(kind)
    names = {
        slot: name for slot, name in enumerate(joint.slots) if name and joint.gradients[slot] is not None
    }
    hoist = {slot for slot, name in names.items() if name.startswith("layers.")}
    whole, split = (
        hoist_weight_gradients(backward, keep=set(names) - hoist, hoist=hoist)
        for backward in (backward_of(joint), split_backward(joint))
    )
    assert not whole.leaves
    weights = {(slot,) for slot in hoist if names[slot].endswith("weight")}
    assert {leaf.slots for leaf in split.leaves} == weights


def test_a_convolution_that_computes_one_gradient_is_left_alone():
    for keep in ({"embed.weight"}, {"layers.0.weight"}):
        joint = restrict_gradients(joint_with("plain"), keep)
        assert text_of(split_backward(joint)) == text_of(backward_of(joint))


def test_splitting_twice_is_splitting_once():
    once = split_backward(joint_with("two in a row"))
    assert text_of(split_convolutions(once)) == text_of(once)


def test_a_tuple_that_is_read_itself_is_left_alone():
    graph = fx.Graph()
    x = graph.placeholder("x")
    arguments = (x, x, x, [6], [1], [0], [1], False, [0], 1, [True, True, True])
    node = graph.call_function(aten.convolution_backward.default, arguments)
    graph.output((graph.call_function(getitem, (node, 1)), node))
    after = split_convolutions(fx.GraphModule({}, graph))
    assert after.graph.find_nodes(op="call_function", target=node.target)[0].args[3:] == arguments[3:]
