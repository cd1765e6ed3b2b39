"""FLOPs of nodes, counting in compiled code, and refusals instead of zeros."""

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import CaptureError, backward_costs
from gtcompile.capture.capture import capture
from gtcompile.graph.flops import (
    count_flops,
    has_flops,
    is_matmul_like,
    node_flops,
    output_flops,
    planning_flops,
)
from gtcompile.torch_internals import with_effects
from tests.support.models import Regression, counted_step, make_batch, step

aten = torch.ops.aten


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def test_a_node_counts_what_flop_counter_mode_counts():
    model, batch = Regression(2), make_batch()
    joint = capture(model, batch)
    predicted = sum(node_flops(node) for node in joint.module.graph.nodes if node.op == "call_function")
    assert predicted == counted(step, model, batch)


def test_an_operator_with_several_results_counts_alike_with_and_without_an_effect_token():
    graph, matrix, solve = fx.Graph(), torch.eye(3), aten._linalg_solve_ex.default
    token, a = graph.placeholder("token"), graph.placeholder("a")
    token.meta["val"], a.meta["val"] = torch.empty(0), matrix
    alone = graph.call_function(solve, (a, a))
    alone.meta["val"] = solve(matrix, matrix)
    ordered = graph.call_function(with_effects, (token, solve, a, a))
    ordered.meta["val"] = (torch.empty(0), *alone.meta["val"])
    assert node_flops(ordered) == node_flops(alone) > 0


def test_counting_sees_into_compiled_code_and_does_not_change_what_runs():
    model, batch = Regression(2), make_batch()
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    gradients_before = [step(compiled, batch), *(p.grad for p in model.parameters())]
    expected = counted(step, model, batch)
    assert counted_step(compiled, batch) == expected > 0
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


@torch.library.custom_op("gtcompile_tests::mystery_gemv", mutates_args=())
def mystery_gemv(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


mystery_gemv.register_fake(lambda x: x.new_empty(x.shape[:-1]))
mystery_gemv.register_autograd(
    lambda ctx, grad: grad.unsqueeze(-1).expand(ctx.shape),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "shape", inputs[0].shape),
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
        CaptureError, match=r"no FLOP formula is known .*gtcompile_tests.mystery_product \(1x\)"
    ):
        backward_costs(Custom(mystery_product, 4, 3), {"x": torch.randn(5, 4)})


def test_every_unknown_operator_is_named_at_once_and_how_to_register_it():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return mystery_gemv(mystery_product(mystery_product(x, self.weight), self.weight)).sum()

    with pytest.raises(CaptureError) as raised:
        backward_costs(Both(), {"x": torch.randn(5, 4)})
    for name, calls in (("mystery_product", 2), ("mystery_gemv", 1)):
        assert f"gtcompile_tests.{name} ({calls}x)" in str(raised.value)
        assert f"gtcompile.register_flops(torch.ops.gtcompile_tests.{name}, formula)" in str(raised.value)


def test_an_unknown_operator_needs_no_formula_to_plan_with():
    joint = capture(Custom(mystery_product, 4, 3), {"x": torch.randn(5, 4)})
    target = torch.ops.gtcompile_tests.mystery_product.default
    (node,) = joint.module.graph.find_nodes(op="call_function", target=target)
    assert has_flops(node)
    assert planning_flops(node) == 5 * 3


def test_an_unknown_operator_that_works_element_by_element_counts_nothing():
    costs = backward_costs(Custom(gate, 4), {"x": torch.randn(5, 4)})
    assert costs.full_flops == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_scaled_mm_v2", True),
        ("spsolve", True),
        ("miopen_rnn", True),
        ("mkldnn_convolution", True),
        ("_linalg_svd", True),
        ("_fft_r2c", True),
        ("convert_element_type", False),
        ("upsample_bilinear2d", False),
        ("constant_pad_nd", False),
        ("slice_inverse", False),
        ("celu", False),
        ("addcmul", False),
        ("lu_unpack", False),
        ("mkldnn_reorder_conv2d_weight", False),
    ],
)
def test_names_of_matmul_like_operators_are_recognised(name, expected):
    assert is_matmul_like(name) is expected


def branch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: (x @ w) @ w, (x, w))


def test_a_conditional_counts_as_its_costlier_branch():
    costs = backward_costs(Custom(branch, 8, 8), {"x": torch.randn(4, 8)})
    assert costs.forward_flops == 2 * (2 * 4 * 8 * 8)


def looped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    step = torch._higher_order_ops.map
    return step(lambda row, w: (row.unsqueeze(0) @ w).squeeze(0), x, w)


def test_a_loop_over_products_is_refused():
    with pytest.raises(CaptureError, match=r"higher_order\.map_impl"):
        backward_costs(Custom(looped, 8, 8), {"x": torch.randn(4, 8)})


@pytest.mark.parametrize("backend", ["specialized", "hoisted", "aot_eager"])
def test_operators_run_in_order_by_another_are_run_and_counted(backend):
    model = Custom(lambda x, w: torch.linalg.cholesky(w @ w.T + torch.eye(6)), 6, 6)
    costs, batch = backward_costs(model, {"x": torch.randn(1)}), {"x": torch.randn(1)}
    torch.compiler.reset()
    if backend == "aot_eager":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = torch.compile(
            model, backend="gtcompile", options={"compiler": "eager", "variants": backend}
        )
    compiled(**batch).backward()
    with count_flops() as counter:
        compiled(**batch).backward()
    assert counter.get_total_flops() == costs.full_flops > 0


@pytest.mark.parametrize(
    ("name", "position"),
    [("run_and_save_rng_state", 0), ("run_with_rng_state", 1), ("graphsafe_run_with_rng_state", 0)],
)
def test_a_product_run_with_a_random_state_is_counted(name, position):
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    arguments = [aten.mm.default, x, w]
    node = graph.call_function(
        getattr(torch.ops.higher_order, name),
        (*([None] * position), *arguments),
        {"rng_state": None} if name.startswith("graphsafe") else {},
    )
    for each, shape in ((x, (3, 4)), (w, (4, 5)), (node, (3, 5))):
        each.meta["val"] = torch.empty(shape, device="meta")
    assert node_flops(node) == 2 * 3 * 4 * 5


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
