"""Models that call `requires_grad_()` on an activation: every step's costs have the backward down to it."""

import pytest
import torch
from torch import nn

from gtcompile import backward_costs, compile_blocks, train_only
from gtcompile.capture.capture import capture
from gtcompile.costs.dependency_graph import work_by_node
from gtcompile.costs.explain import alive_backward_nodes, saved_bytes
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import FORCED_GRADIENTS, JointGraph
from gtcompile.passes.pipeline import restrict_gradients
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


def forced_twice(x):
    by_setter(x)
    return by_call(x)


WAYS = (by_setter, by_call, without_gradients, forced_twice)


class Layer(nn.Module):
    """A linear layer and its nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Forcing(nn.Module):
    """Three layers; a gradient is forced on a view of the batch, and perhaps on the second layer's input."""

    def __init__(self, force, between=None, branches: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.force, self.between, self.branches = force, between, branches

    def forward(self, x):
        x = self.force(x[:, None])
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
@pytest.mark.parametrize("force", WAYS)
def test_what_is_predicted_is_counted(force, branches):
    model = Forcing(force, branches=branches)
    costs = backward_costs(model, batch())
    assert costs.follows_values == branches
    for trained in random_sets(sorted(costs.fqns), 3):
        train_only(model, trained)
        assert counted(model) == costs.step_flops(trained)
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops + chain_flops(3)


def test_each_forced_gradient_has_its_own_work():
    model = Forcing(by_setter, without_gradients)
    costs = backward_costs(model, batch())
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops + chain_flops(2)
    train_only(model, {"layers.2.linear.bias"})
    assert counted(model) == costs.step_flops({"layers.2.linear.bias"})


def test_requires_grad_that_is_set_back_to_false_costs_nothing():
    costs = backward_costs(Forcing(taken_back), batch())
    assert costs.step_flops({"layers.2.linear.bias"}) == costs.forward_flops


@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_compiled_models_take_what_is_predicted_and_have_eager_gradients(scope):
    model = Forcing(by_setter)
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    if scope == "blocks":
        run = compile_blocks(model, compiler="eager")
    costs = backward_costs(run, batch())
    for trained in random_sets(sorted(costs.fqns), 2):
        train_only(run, trained)
        counted(run)
        assert counted(run) == costs.step_flops(trained)
        assert_same_gradients(model, reference_gradients(run, batch()))


def test_a_graph_has_forced_gradients_until_it_is_restricted():
    joint = capture(Forcing(by_setter), batch())
    trained = frozenset({"layers.2.linear.bias"})
    assert FORCED_GRADIENTS in joint.slots
    assert joint.live == {f"layers.{i}.linear.{kind}" for i in range(3) for kind in ("weight", "bias")}
    restricted = restrict_gradients(joint, trained)
    assert restricted.live == trained
    assert products(restricted) == 3
    assert products(joint) == 3 + 3 + 3


def test_reports_count_forced_gradients_with_every_set():
    joint = capture(Forcing(by_setter), batch())
    few, all_of_them = frozenset({"layers.2.linear.bias"}), joint.live
    assert alive_backward_nodes(joint, few) < alive_backward_nodes(joint, all_of_them)
    assert 0 < saved_bytes(joint, few) <= saved_bytes(joint, all_of_them)


def test_a_model_that_forces_nothing_has_no_such_gradient():
    joint = capture(Forcing(lambda x: x, branches=True), batch())
    assert joint.gradients[joint.slots.index(FORCED_GRADIENTS)] is None
    inputs = [node.name for node in joint.module.graph.find_nodes(op="placeholder")]
    assert inputs == [*(f"primals_{i}" for i in range(1, 6 + 1 + 1)), "tangents_1"]  # parameters, batch, loss
