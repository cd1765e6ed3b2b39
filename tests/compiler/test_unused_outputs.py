"""Side work: what models compute beside their loss is predicted, and no zeros run back through it."""

from typing import Any

import pytest
import torch
from torch import nn

from gtcompile import backward_costs, compile_blocks, train_only
from gtcompile.compiler.region_graph import gradient_positions, region_node
from gtcompile.graph.flops import count_flops
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import captures

WIDTH = 8
SETS = (
    ["layers.*", "head.*"],
    ["layers.1.*"],
    ["layers.*.state.weight", "head.bias"],
    ["layers.0.inner.bias"],
)


class Memory:
    """What a model hands to whoever continues it, as caches of keys and values are."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []


class Remembering(nn.Module):
    """A block that also computes a state that nobody may read, and a number from it that is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key = self.state(x)
        hidden = x + torch.tanh(self.inner(x)) * key
        return hidden, key.mT @ hidden, key @ key.mT


class Model(nn.Module):
    """Returns its loss and, in an object, the states of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Remembering() for _ in range(2))
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        memory = Memory()
        for layer in self.layers:
            x, state, _ = layer(x)
            memory.states.append(state)
        self.pooler(x)
        return {"loss": self.head(x).square().mean(), "memory": memory}


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))}


def compiled(model: nn.Module, scope: str, compiler: str) -> Any:
    if scope == "blocks":
        return compile_blocks(model, compiler=compiler)
    return torch.compile(model, backend="gtcompile", options={"compiler": compiler, "variants": scope})


SCOPES = pytest.mark.parametrize("scope", ["blocks", "hoisted", "specialized"])


def counted(run: nn.Module) -> int:
    run.zero_grad()
    with count_flops() as counter:
        run(**batch())["loss"].backward()
    return counter.get_total_flops()


@SCOPES
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_predicted_flops_are_those_counted_and_gradients_those_of_eager_freezing(scope, compiler):
    model = Model()
    run = compiled(model, scope, compiler)
    costs = backward_costs(run, batch())
    run(**batch())["loss"].backward()  # a specialized region learns here what is differentiated
    for patterns in SETS:
        trained = train_only(run, patterns)
        assert counted(run) == costs.step_flops(trained)
        tolerance = {} if compiler == "eager" else {"rtol": 1e-4, "atol": 1e-6}
        assert_same_gradients(model, reference_gradients(run, batch()), **tolerance)


def test_what_eager_pytorch_computes_beside_the_loss_is_in_the_costs_of_compiled_blocks():
    costs, model = backward_costs(compile_blocks(Model(), compiler="eager"), batch()), Model()
    for patterns in SETS:
        trained = train_only(model, patterns)
        assert counted(model) == costs.step_flops(trained)


def test_a_model_compiled_as_a_whole_drops_what_nobody_is_given():
    whole, blocks = (backward_costs(m, batch()) for m in (Model(), compile_blocks(Model(), compiler="eager")))
    dropped = 2 * (2 * 2 * 5 * 5 * WIDTH) + 2 * 10 * WIDTH * WIDTH  # two products of keys, and the pooler
    assert blocks.forward_flops - whole.forward_flops == dropped
    assert blocks.shared_work == whole.shared_work


@SCOPES
def test_a_state_that_is_differentiated_after_all_gets_its_gradient(scope):
    model, eager = Model(), Model()
    run = compiled(model, scope, "eager")
    for patterns in SETS:
        train_only(run, patterns)
        train_only(eager, patterns)
        for with_state in (False, True, False, True):
            for each in (run, eager):
                each.zero_grad()
                output = each(**batch())
                total = output["loss"] + sum(s.square().sum() for s in output["memory"].states) * with_state
                total.backward()
            expected = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
            assert_same_gradients(model, expected)


@SCOPES
def test_one_graph_is_differentiated_now_through_one_output_and_now_through_another(scope):
    model, eager = Model(), Model()
    run = compiled(model, scope, "eager")
    run(**batch())["loss"].backward()
    for each in (run, eager):
        each.zero_grad()
        output = each(**batch())
        output["loss"].backward(retain_graph=True)
        output["memory"].states[1].sum().backward(retain_graph=True)
        output["loss"].backward()
    assert_same_gradients(model, {name: p.grad for name, p in eager.named_parameters() if p.grad is not None})


@SCOPES
def test_learning_what_is_differentiated_captures_nothing_again(scope):
    run = compiled(Model(), scope, "eager")
    run(**batch())["loss"].backward()
    before = captures()
    for patterns in SETS:
        train_only(run, patterns)
        counted(run)
    assert captures() == before


def test_the_gradient_of_an_output_is_found_through_views_and_not_through_inputs():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            right = self.right(x)
            return right.view(-1), self.left(x), x, right.t()

    x = torch.randn(2, 2)
    outputs = torch.compile(Several(), backend="aot_eager")(x)
    node = region_node(outputs, [x])
    positions = gradient_positions(outputs, node)
    assert positions.keys() == {0, 1, 3}
    seen = []
    node.register_prehook(lambda gradients: seen.extend(g is not None for g in gradients))
    outputs[0].sum().backward()
    assert [seen[positions[i]] for i in (0, 1, 3)] == [True, False, True]
