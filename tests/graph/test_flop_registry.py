"""Formulas that users register: who counts them, what they are given, what is refused."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gtcompile import backward_costs, register_flops
from gtcompile.graph.flop_registry import register_missing_formulas


@torch.library.custom_op("gtcompile_tests::blackbox_product", mutates_args=())
def blackbox_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


blackbox_product.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[-1]))
blackbox_product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
PACKET = torch.ops.gtcompile_tests.blackbox_product


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return blackbox_product(x, self.weight).square().mean()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    flop_registry.pop(PACKET, None)


def test_a_registered_formula_is_predicted_and_counted():
    register_flops(PACKET, lambda x, w: 2 * x[0] * x[1] * w[1])
    model, batch = Product(), {"x": torch.randn(5, 4)}
    costs = backward_costs(model, batch)
    assert costs.forward_flops == 2 * 5 * 4 * 3
    assert costs.full_flops == 2 * costs.forward_flops
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    assert counter.get_total_flops() == costs.forward_flops


@pytest.mark.parametrize(
    "operator", [PACKET, PACKET.default, blackbox_product, "gtcompile_tests::blackbox_product"], ids=str
)
def test_an_operator_may_be_named_in_several_ways(operator):
    register_flops(operator, lambda x, w: 7)
    assert backward_costs(Product(), {"x": torch.randn(5, 4)}).forward_flops == 7


def test_a_formula_may_take_the_shape_of_the_output_and_the_last_one_counts():
    register_flops(PACKET, lambda x, w: 7)
    register_flops(PACKET, lambda x, w, *, out_shape: 2 * out_shape[0] * out_shape[1] * x[1])
    assert backward_costs(Product(), {"x": torch.randn(5, 4)}).forward_flops == 2 * 5 * 4 * 3


@pytest.mark.parametrize(
    ("operator", "formula", "error", "match"),
    [
        (torch.matmul, lambda *_: 0, TypeError, "expected an operator such as torch.ops.library.name"),
        (PACKET, 7, TypeError, "expected a function from shapes to FLOPs, got 7"),
        (
            "gtcompile_tests::missing",
            lambda *_: 0,
            ValueError,
            "no operator is called 'gtcompile_tests::missing'",
        ),
        ("blackbox_product", lambda *_: 0, ValueError, "expected 'library::name'"),
    ],
)
def test_what_is_no_operator_or_no_formula_is_refused(operator, formula, error, match):
    with pytest.raises(error, match=match):
        register_flops(operator, formula)


def test_formulas_that_are_registered_already_are_left_alone():
    register_missing_formulas()  # a library imported since may have brought operators
    before = dict(flop_registry)
    register_missing_formulas()
    assert flop_registry == before
