"""FLOP formulas against hand counts, counting in compiled code, and refusals instead of zeros."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.errors import CaptureError
from gtcompile.graph.flops import (
    MISSING_FORMULAS,
    count_flops,
    node_flops,
    output_flops,
    register_missing_formulas,
)
from tests.support.models import Regression, make_batch, step

aten = torch.ops.aten


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


BATCH, HEADS, LENGTH, SOURCE, DIM = 2, 3, 5, 7, 4
QUERY, KEY = (BATCH, HEADS, LENGTH, DIM), (BATCH, HEADS, SOURCE, DIM)
SCORES = 2 * BATCH * HEADS * LENGTH * SOURCE * DIM
"""FLOPs of queries times keys; the weights times the values cost as much."""


def attention(requires_grad=False) -> torch.Tensor:
    query, key, value = (torch.randn(shape, requires_grad=requires_grad) for shape in (QUERY, KEY, KEY))
    return nn.functional.scaled_dot_product_attention(query, key, value)


def attention_backward() -> int:
    output = attention(requires_grad=True)
    return counted(output.sum().backward)


def square(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def grouped(*shapes: tuple[int, ...]) -> int:
    """The formula itself: its kernel needs bfloat16 and alignments that say nothing about FLOPs."""
    left, right, out = shapes
    return MISSING_FORMULAS["aten::_grouped_mm"](left, right, out_shape=out)


HAND_COUNTS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": (lambda: counted(attention), 2 * SCORES),
    # recomputed scores, dV, dP, dQ, dK
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (attention_backward, 5 * SCORES),
    "aten::mv": (lambda: counted(torch.mv, square(3, 4), square(4)), 2 * 3 * 4),
    "aten::addmv": (lambda: counted(torch.addmv, square(3), square(3, 4), square(4)), 2 * 3 * 4),
    "aten::dot": (lambda: counted(torch.dot, square(5), square(5)), 2 * 5),
    "aten::vdot": (lambda: counted(torch.vdot, square(5), square(5)), 2 * 5),
    "aten::addr": (lambda: counted(torch.addr, square(3, 4), square(3), square(4)), 2 * 3 * 4),
    "aten::addbmm": (
        lambda: counted(torch.addbmm, square(3, 5), square(2, 3, 4), square(2, 4, 5)),
        2 * 2 * 3 * 4 * 5,
    ),
    "aten::linalg_solve_triangular": (
        lambda: counted(
            torch.linalg.solve_triangular, square(4, 4).tril() + 4 * torch.eye(4), square(4, 3), upper=False
        ),
        4 * 4 * 3,
    ),
    "aten::_grouped_mm": (lambda: grouped((10, 4), (3, 4, 5), (10, 5)), 2 * 10 * 4 * 5),
    "transformers::grouped_mm_fallback": (
        lambda: MISSING_FORMULAS["transformers::grouped_mm_fallback"]((10, 4), (3, 4, 5)),
        2 * 10 * 4 * 5,
    ),
    "transformers::grouped_mm_fallback_backward": (
        lambda: MISSING_FORMULAS["transformers::grouped_mm_fallback_backward"]((10, 4), (3, 4, 5)),
        2 * 2 * 10 * 4 * 5,
    ),
}
"""Operator -> what is counted, and what a hand counts."""


def test_every_registered_formula_has_a_hand_count():
    assert HAND_COUNTS.keys() == MISSING_FORMULAS.keys()


@pytest.mark.parametrize("name", MISSING_FORMULAS)
def test_a_registered_formula_counts_what_a_hand_counts(name):
    count, expected = HAND_COUNTS[name]
    assert count() == expected


def test_the_weight_gradients_of_grouped_products_contract_over_the_rows():
    assert grouped((4, 10), (10, 5), (3, 4, 5)) == 2 * 4 * 10 * 5


def test_formulas_torch_has_already_are_left_alone():
    register_missing_formulas()  # a library imported since may have brought operators
    before = dict(flop_registry)
    register_missing_formulas()
    assert flop_registry == before


def test_a_node_counts_what_flop_counter_mode_counts():
    model, batch = Regression(2), make_batch()
    joint = capture(model, batch)
    predicted = sum(node_flops(node) for node in joint.module.graph.nodes if node.op == "call_function")
    assert predicted == counted(step, model, batch)


def test_counting_sees_into_compiled_code_and_does_not_change_what_runs():
    model, batch = Regression(2), make_batch()
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    gradients_before = [step(compiled, batch), *(p.grad for p in model.parameters())]
    expected = counted(step, model, batch)
    with count_flops() as counter:
        step(compiled, batch)
    assert counter.get_total_flops() == expected > 0
    assert all(
        map(torch.equal, gradients_before, [step(compiled, batch), *(p.grad for p in model.parameters())])
    )


def test_counting_adds_up_over_steps_and_starts_from_zero():
    model, batch = Regression(2), make_batch()
    totals = []
    for steps in (1, 3):
        with count_flops() as counter:
            for _ in range(steps):
                step(model, batch)
        totals.append(counter.get_total_flops())
    assert totals[1] == 3 * totals[0] > 0


def convolution_backward(joint):
    (node,) = joint.module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return node


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Conv1d(2, 3, 3)

    def forward(self, x):
        return self.second(self.first(x)).square().mean()


def test_each_output_of_a_convolutions_backward_is_counted_by_itself():
    joint = capture(Convolved(), {"x": torch.randn(4, 2, 6)})
    node = convolution_backward(joint)
    products = 2 * 4 * 3 * 4 * 2 * 3  # batch, channels out, places, channels in, kernel
    assert output_flops(node) == {0: products, 1: products, 2: 0}
    assert sum(output_flops(node).values()) == node_flops(node)


def test_other_operators_are_counted_as_one_piece():
    joint = capture(Regression(1), make_batch())
    assert all(not output_flops(node) for node in joint.module.graph.nodes if node.op == "call_function")


@torch.library.custom_op("gtcompile_tests::mystery_product", mutates_args=())
def mystery_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


mystery_product.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[-1]))
mystery_product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("gtcompile_tests::gate", mutates_args=())
def gate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


gate.register_fake(lambda x, w: torch.empty_like(x))
gate.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Custom(nn.Module):
    def __init__(self, operator, *shape):
        super().__init__()
        self.operator, self.weight = operator, nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.operator(x, self.weight).square().mean()


def test_an_unknown_operator_over_two_matrices_is_refused():
    with pytest.raises(
        CaptureError, match=r"gtcompile_tests.mystery_product.* has no FLOP formula"
    ) as raised:
        backward_costs(Custom(mystery_product, 4, 3), {"x": torch.randn(5, 4)})
    assert "register_flop_formula(torch.ops.gtcompile_tests.mystery_product)" in str(raised.value)


def test_an_unknown_operator_with_a_formula_of_the_users_is_counted():
    packet = torch.ops.gtcompile_tests.mystery_product
    flop_registry[packet] = lambda x, w, *_, out_val=None, **__: 2 * x.numel() * w.shape[-1]
    try:
        costs = backward_costs(Custom(mystery_product, 4, 3), {"x": torch.randn(5, 4)})
    finally:
        del flop_registry[packet]
    assert costs.forward_flops == 2 * 5 * 4 * 3
    assert costs.full_flops == 2 * costs.forward_flops


def test_an_unknown_operator_that_works_element_by_element_counts_nothing():
    costs = backward_costs(Custom(gate, 4), {"x": torch.randn(5, 4)})
    assert costs.full_flops == 0


def test_an_unknown_matmul_of_torchs_own_is_refused():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return torch.cdist(x, self.centers).mean()

    with pytest.raises(CaptureError, match=r"cdist.* does matmul-like work"):
        backward_costs(Distances(), {"x": torch.randn(5, 4)})


@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
def test_what_is_only_traced_is_not_counted(variants):
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    options = {"compiler": "eager", "variants": variants}
    compiled, x = torch.compile(model, backend="gtcompile", options=options), torch.randn(5, 8)
    counted = []
    for _ in range(2):
        with count_flops() as counter:
            compiled(x).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted == [4480, 4480]
