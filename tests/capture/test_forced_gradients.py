"""Models that have an activation ask for a gradient: the backward down to it is in every step's costs."""

import pytest
import torch
from torch import nn

from gtcompile.capture.capture import capture
from gtcompile.compiler.blocks import compile_blocks
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.costs.dependency_graph import work_by_node
from gtcompile.costs.explain import alive_backward_nodes, saved_bytes
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import ASKED, JointGraph
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.state.trained_set import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import random_sets

ROWS, WIDTH = 5, 6


def by_setter(x):
    x.requires_grad = True
    return x


def by_call(x):
    return x.requires_grad_()


def without_gradients(x):
    with torch.no_grad():
        x = x * 2
        x.requires_grad_(requires_grad=True)
    return x


def taken_back(x):
    by_setter(x)
    x.requires_grad = False
    return x


def asked_already(x):
    by_setter(x)
    return by_call(x)


WAYS = (by_setter, by_call, without_gradients, asked_already)


class Layer(nn.Module):
    """A linear layer and its nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Asking(nn.Module):
    """Three layers; a view of the batch asks for a gradient, and so may what the second one is given."""

    def __init__(self, ask, between=None, branches: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.ask, self.between, self.branches = ask, between, branches

    def forward(self, x):
        x = self.ask(x[:, None])
        for position, layer in enumerate(self.layers):
            if position == 1 and self.between:
                x = self.between(x.detach())
            x = layer(x)
        if self.branches and x.sum() > 100:
            x = 2 * x
        return x.square().mean()


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))}


def counted(run: nn.Module) -> int:
    run.zero_grad()
    with count_flops() as counter:
        run(**batch()).backward()
    return counter.get_total_flops()


def chain_flops(layers: int) -> int:
    """FLOPs of activation gradients down through some layers."""
    return layers * 2 * ROWS * WIDTH * WIDTH


def products(joint: JointGraph) -> int:
    """How many nodes multiply matrices."""
    return sum(flops > 0 for flops in work_by_node(joint.module.graph.nodes).values())


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("ask", WAYS)
def test_what_is_predicted_is_counted(ask, branches):
    model = Asking(ask, branches=branches)
    costs = backward_costs(model, batch())
    assert costs.follows_values == branches
    for trained in random_sets(sorted(costs.fqns), 3):
        train_only(model, trained)
        assert counted(model) == costs.step_flops(trained)
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops + chain_flops(3)


def test_several_of_them_each_have_their_work():
    model = Asking(by_setter, without_gradients)
    costs = backward_costs(model, batch())
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops + chain_flops(2)
    train_only(model, {"layers.2.linear.bias"})
    assert counted(model) == costs.step_flops({"layers.2.linear.bias"})


def test_who_takes_it_back_has_none():
    costs = backward_costs(Asking(taken_back), batch())
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops


@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_compiled_models_take_what_is_predicted_and_have_eager_gradients(scope):
    model = Asking(by_setter)
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    if scope == "blocks":
        run = compile_blocks(model, compiler="eager")
    costs = backward_costs(run, batch())
    for trained in random_sets(sorted(costs.fqns), 2):
        train_only(run, trained)
        counted(run)
        assert counted(run) == costs.step_flops(trained)
        assert_same_gradients(model, reference_gradients(run, batch()))


def test_a_graph_has_their_gradients_and_one_that_is_restricted_has_not():
    joint = capture(Asking(by_setter), batch())
    trained = frozenset({"layers.2.linear.bias"})
    assert ASKED in joint.slots
    assert joint.live == {f"layers.{i}.linear.{kind}" for i in range(3) for kind in ("weight", "bias")}
    restricted = restrict_gradients(joint, trained)
    assert restricted.live == trained
    assert products(restricted) == 3
    assert products(joint) == 3 + 3 + 3


def test_reports_count_their_work_with_every_set():
    joint = capture(Asking(by_setter), batch())
    few, all_of_them = frozenset({"layers.2.linear.bias"}), joint.live
    assert alive_backward_nodes(joint, few) < alive_backward_nodes(joint, all_of_them)
    assert 0 < saved_bytes(joint, few) <= saved_bytes(joint, all_of_them)


def test_a_model_that_asks_for_nothing_has_no_such_gradient():
    joint = capture(Asking(lambda x: x, branches=True), batch())
    assert joint.gradients[joint.slots.index(ASKED)] is None
    inputs = [node.name for node in joint.module.graph.find_nodes(op="placeholder")]
    assert inputs == [*(f"primals_{i}" for i in range(1, 6 + 1 + 1)), "tangents_1"]  # parameters, batch, loss
