"""Every FLOP formula against a count by hand; predicted costs against what runs."""

import contextlib
from math import log2

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import backward_costs
from gtcompile.graph.flop_formulas import FORMULAS
from gtcompile.graph.flops import count_flops


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def r(*shape: int, requires_grad=False) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=requires_grad)


def positive(size: int) -> torch.Tensor:
    """A positive definite matrix."""
    x = r(size, size)
    return x @ x.T + size * torch.eye(size)


def by_formula(name: str, *args, **kwargs):
    """The formula itself: its kernel needs a device, a type or a library that the tests do not have."""
    return lambda: FORMULAS[name](*args, **kwargs)


def by_running(function, *args, **kwargs):
    """What `FlopCounterMode` counts when the operator runs."""
    return lambda: counted(function, *args, **kwargs)


BATCH, HEADS, LENGTH, SOURCE, DIM = 2, 3, 5, 7, 4
QUERY, KEY = (BATCH, HEADS, LENGTH, DIM), (BATCH, HEADS, SOURCE, DIM)
SCORES = 2 * BATCH * HEADS * LENGTH * SOURCE * DIM
"""FLOPs of queries times keys; the weights times the values cost as much."""


def attention(requires_grad=False) -> torch.Tensor:
    query, key, value = (r(*shape, requires_grad=requires_grad) for shape in (QUERY, KEY, KEY))
    return nn.functional.scaled_dot_product_attention(query, key, value)


def backward_of(function, *args):
    """What the backward of a function counts."""
    return lambda: counted(function(*args).sum().backward)


def bilinear(mode: str) -> int:
    layer, left, right = nn.Bilinear(4, 5, 3), r(7, 4, requires_grad=True), r(7, 5, requires_grad=True)
    if mode == "forward":
        return counted(layer, left, right)
    return counted(layer(left, right).sum().backward)


aten = torch.ops.aten
N, M = 6, 9
LU = 2 * N**3 // 3
TALL = 2 * N**2 * M - 2 * N**3 // 3
"""FLOPs of the QR factors of a 9 x 6 matrix."""
GATES = 4 * (8 * 5 + 8 * 8)
"""Elements of the weights of an LSTM from 5 features to 8."""
HAND_COUNTS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": (by_running(attention), 2 * SCORES),
    # recomputed scores, dV, dP, dQ, dK
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (
        backward_of(attention, True),
        5 * SCORES,
    ),
    "aten::_scaled_dot_product_fused_attention_overrideable": (
        by_formula("aten::_scaled_dot_product_fused_attention_overrideable", QUERY, KEY, KEY),
        2 * SCORES,
    ),
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": (
        by_formula("aten::_scaled_dot_product_fused_attention_overrideable_backward", QUERY, QUERY, KEY, KEY),
        5 * SCORES,
    ),
    "aten::mv": (by_running(torch.mv, r(3, 4), r(4)), 2 * 3 * 4),
    "aten::addmv": (by_running(torch.addmv, r(3), r(3, 4), r(4)), 2 * 3 * 4),
    "aten::dot": (by_running(torch.dot, r(5), r(5)), 2 * 5),
    "aten::vdot": (by_running(torch.vdot, r(5), r(5)), 2 * 5),
    "aten::addr": (by_running(torch.addr, r(3, 4), r(3), r(4)), 2 * 3 * 4),
    "aten::addbmm": (by_running(torch.addbmm, r(3, 5), r(2, 3, 4), r(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "aten::addmv_": (by_running(r(3).addmv_, r(3, 4), r(4)), 2 * 3 * 4),
    "aten::addr_": (by_running(r(3, 4).addr_, r(3), r(4)), 2 * 3 * 4),
    "aten::addmm_": (by_running(r(3, 5).addmm_, r(3, 4), r(4, 5)), 2 * 3 * 4 * 5),
    "aten::addbmm_": (by_running(r(3, 5).addbmm_, r(2, 3, 4), r(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "aten::baddbmm_": (by_running(r(2, 3, 5).baddbmm_, r(2, 3, 4), r(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "aten::_addmm_activation": (
        by_running(aten._addmm_activation, r(5), r(3, 4), r(4, 5)),
        2 * 3 * 4 * 5,
    ),
    "aten::_foreach_mm": (
        by_formula("aten::_foreach_mm", [(3, 4), (2, 2)], [(4, 5), (2, 2)]),
        2 * 3 * 4 * 5 + 2 * 2 * 2 * 2,
    ),
    "aten::linear": (by_formula("aten::linear", (2, 3, 4), (5, 4), (5,)), 2 * 2 * 3 * 4 * 5),
    "aten::linear_backward": (
        by_formula("aten::linear_backward", (3, 4), (3, 5), (5, 4), [False, True, True]),
        2 * 3 * 4 * 5,
    ),
    "aten::mkldnn_linear": (by_formula("aten::mkldnn_linear", (3, 4), (5, 4)), 2 * 3 * 4 * 5),
    "mkldnn::_linear_pointwise": (
        by_running(torch.ops.mkldnn._linear_pointwise, r(3, 4), r(5, 4), None, "none", [], ""),
        2 * 3 * 4 * 5,
    ),
    # for each of 3 outputs: rows by the matrix, then by the other rows
    "aten::_trilinear": (lambda: bilinear("forward"), 3 * (2 * 7 * 4 * 5 + 2 * 7 * 5)),
    "aten::conv_tbc": (by_running(torch.conv_tbc, r(10, 2, 4), r(3, 4, 5), r(5)), 2 * 8 * 2 * 5 * 3 * 4),
    "aten::_embedding_bag_per_sample_weights_backward": (
        by_formula("aten::_embedding_bag_per_sample_weights_backward", (2, 8), (50, 8), (6,), (2,)),
        2 * 6 * 8,
    ),
    "aten::_grouped_mm": (
        by_formula("aten::_grouped_mm", (10, 4), (3, 4, 5), out_shape=(10, 5)),
        2 * 10 * 4 * 5,
    ),
    "aten::_scaled_grouped_mm": (
        by_formula("aten::_scaled_grouped_mm", (10, 4), (3, 4, 5), (10,), (3, 5), out_shape=(10, 5)),
        2 * 10 * 4 * 5,
    ),
    # the weight gradients of three groups contract over the rows
    "aten::_scaled_grouped_mm_v2": (
        by_formula("aten::_scaled_grouped_mm_v2", (4, 10), (10, 5), out_shape=(3, 4, 5)),
        2 * 4 * 10 * 5,
    ),
    "aten::_scaled_mm_v2": (by_formula("aten::_scaled_mm_v2", (3, 4), (4, 5), [(1,)]), 2 * 3 * 4 * 5),
    "aten::_int_mm": (
        by_running(torch._int_mm, torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)),
        2 * 32 * 16 * 8,
    ),
    "aten::_weight_int8pack_mm": (
        by_formula("aten::_weight_int8pack_mm", (3, 4), (5, 4), (5,)),
        2 * 3 * 4 * 5,
    ),
    "aten::_weight_int4pack_mm": (
        by_formula("aten::_weight_int4pack_mm", (3, 64), (1, 1, 32, 4), 32, (2, 8, 2), out_shape=(3, 8)),
        2 * 3 * 64 * 8,
    ),
    "aten::_weight_int4pack_mm_for_cpu": (
        by_formula("aten::_weight_int4pack_mm_for_cpu", (3, 64), (8, 32), 32, (2, 8, 2), out_shape=(3, 8)),
        2 * 3 * 64 * 8,
    ),
    "aten::_weight_int4pack_mm_with_scales_and_zeros": (
        by_formula(
            "aten::_weight_int4pack_mm_with_scales_and_zeros", (3, 64), (8, 32), 32, (2, 8), out_shape=(3, 8)
        ),
        2 * 3 * 64 * 8,
    ),
    "aten::_dyn_quant_matmul_4bit": (
        by_formula("aten::_dyn_quant_matmul_4bit", (3, 64), (700,), 32, 64, 8),
        2 * 3 * 64 * 8,
    ),
    "bitsandbytes::int8_linear_matmul": (
        by_formula("bitsandbytes::int8_linear_matmul", (3, 4), (5, 4)),
        2 * 3 * 4 * 5,
    ),
    "bitsandbytes::int8_scaled_mm": (
        by_formula("bitsandbytes::int8_scaled_mm", (3, 4), (5, 4), (3,), (5,)),
        2 * 3 * 4 * 5,
    ),
    "bitsandbytes::int8_mixed_scaled_mm": (
        by_formula("bitsandbytes::int8_mixed_scaled_mm", (3, 4), (3, 4), (5, 4), (3,), (5,)),
        2 * 3 * 4 * 5,
    ),
    "bitsandbytes::gemv_4bit": (
        by_formula("bitsandbytes::gemv_4bit", (1, 64), (256, 1), [8, 64], (8,), (16,), 64),
        2 * 64 * 8,
    ),
    "bitsandbytes::gemm_4bit": (
        by_formula("bitsandbytes::gemm_4bit", (3, 5, 64), (256, 1), [8, 64], (8,), 64, "nf4"),
        2 * 3 * 5 * 64 * 8,
    ),
    "torchao::int_matmul": (by_formula("torchao::int_matmul", (3, 4), (4, 5)), 2 * 3 * 4 * 5),
    "torchao::int_scaled_matmul": (
        by_formula("torchao::int_scaled_matmul", (3, 4), (4, 5), (3, 1)),
        2 * 3 * 4 * 5,
    ),
    "transformers::grouped_mm_fallback": (
        by_formula("transformers::grouped_mm_fallback", (10, 4), (3, 4, 5)),
        2 * 10 * 4 * 5,
    ),
    "transformers::grouped_mm_fallback_backward": (
        by_formula("transformers::grouped_mm_fallback_backward", (10, 4), (3, 4, 5)),
        2 * 2 * 10 * 4 * 5,
    ),
    "aten::_cdist_forward": (by_running(torch.cdist, r(3, 4), r(5, 4)), 3 * 3 * 5 * 4),
    "aten::_cdist_backward": (
        backward_of(torch.cdist, r(3, 4, requires_grad=True), r(5, 4)),
        3 * 3 * 5 * 4,
    ),
    "aten::_euclidean_dist": (by_running(torch.cdist, r(30, 4), r(40, 4)), 2 * 30 * 40 * 6),
    "aten::_pdist_forward": (by_running(torch.pdist, r(5, 4)), 3 * 10 * 4),
    "aten::_pdist_backward": (backward_of(torch.pdist, r(5, 4, requires_grad=True)), 4 * 10 * 4),
    "aten::_fft_c2c": (
        by_running(torch.fft.fft, torch.randn(3, 8, dtype=torch.complex64)),
        5 * 3 * 8 * log2(8),
    ),
    "aten::_fft_r2c": (by_running(torch.fft.rfft2, r(3, 8, 4)), 2.5 * 3 * 32 * log2(32)),
    "aten::_fft_c2r": (by_running(torch.fft.irfft, torch.randn(3, 5, dtype=torch.complex64)), 2.5 * 24 * 3),
    "aten::linalg_lu": (by_running(torch.linalg.lu, r(2, N, N)), 2 * LU),
    # rows times squared columns, less a third of the columns cubed
    "aten::linalg_lu_factor_ex": (by_running(torch.linalg.lu_factor_ex, r(M, N)), M * N**2 - N**3 // 3),
    "aten::_linalg_det": (by_running(torch.linalg.det, r(N, N)), LU),
    "aten::_linalg_slogdet": (by_running(torch.linalg.slogdet, r(N, N)), LU),
    "aten::linalg_lu_solve": (
        by_running(torch.linalg.lu_solve, *torch.linalg.lu_factor(r(N, N)), r(N, 4)),
        2 * N**2 * 4,
    ),
    "aten::_linalg_solve_ex": (by_running(torch.linalg.solve, r(N, N), r(N, 4)), LU + 2 * N**2 * 4),
    "aten::linalg_solve_triangular": (
        by_running(torch.linalg.solve_triangular, r(4, 4).tril() + 4 * torch.eye(4), r(4, 3), upper=False),
        4 * 4 * 3,
    ),
    "aten::triangular_solve": (
        by_formula("aten::triangular_solve", (4, 3), (4, 4), out_shape=[(4, 3), (4, 4)]),
        4 * 4 * 3,
    ),
    "aten::linalg_inv_ex": (by_running(torch.linalg.inv, r(N, N)), LU + 2 * N**3),
    "aten::linalg_cholesky_ex": (by_running(torch.linalg.cholesky, positive(N)), N**3 // 3),
    "aten::cholesky": (by_formula("aten::cholesky", (N, N), False), N**3 // 3),
    "aten::cholesky_solve": (by_running(torch.cholesky_solve, r(N, 4), positive(N)), 2 * N**2 * 4),
    "aten::cholesky_inverse": (by_running(torch.cholesky_inverse, positive(N)), 2 * N**3 // 3),
    "aten::linalg_ldl_factor_ex": (by_running(torch.linalg.ldl_factor, positive(N)), N**3 // 3),
    "aten::linalg_ldl_solve": (
        by_running(torch.linalg.ldl_solve, *torch.linalg.ldl_factor(positive(N)), r(N, 4)),
        2 * N**2 * 4,
    ),
    # factors, and Q from 6 reflectors: 4 (9 * 6 * 6) - 2 (9 + 6) 6^2 + 4/3 6^3
    "aten::linalg_qr": (by_running(torch.linalg.qr, r(M, N)), TALL + 4 * M * N * N - 30 * N**2 + 288),
    "aten::geqrf": (by_running(torch.geqrf, r(M, N)), TALL),
    "aten::linalg_householder_product": (
        by_running(torch.linalg.householder_product, r(M, N), r(N)),
        4 * M * N * N - 30 * N**2 + 288,
    ),
    "aten::ormqr": (by_running(torch.ormqr, r(M, N), r(N), r(M, 4)), 2 * 4 * N * (2 * M - N)),
    "aten::_linalg_svd": (
        by_running(torch.linalg.svd, r(M, N), full_matrices=False),
        14 * M * N**2 + 8 * N**3,
    ),
    "aten::_linalg_eigh": (by_running(torch.linalg.eigh, positive(N)), 9 * N**3),
    "aten::linalg_eig": (by_running(torch.linalg.eig, r(N, N)), 25 * N**3),
    "aten::linalg_eigvals": (by_formula("aten::linalg_eigvals", (N, N)), 10 * N**3),
    "aten::_linalg_eigvals": (by_formula("aten::_linalg_eigvals", (N, N)), 10 * N**3),
    # factors, Q on the 4 right sides, substitution
    "aten::linalg_lstsq": (
        by_running(torch.linalg.lstsq, r(M, N), r(M, 4)),
        TALL + 2 * 4 * N * (2 * M - N) + 4 * N**2,
    ),
    "aten::linalg_pinv": (
        by_running(torch.linalg.pinv, r(M, N)),
        14 * M * N**2 + 8 * N**3 + 2 * M * N * N,
    ),
    "aten::linalg_matrix_exp": (by_running(torch.linalg.matrix_exp, r(2, N, N)), 2 * 5 * 2 * N**3),
    "aten::mkldnn_rnn_layer": (by_running(nn.LSTM(5, 8), r(7, 3, 5)), 2 * 7 * 3 * GATES),
    "aten::mkldnn_rnn_layer_backward": (
        backward_of(lambda x: nn.LSTM(5, 8)(x)[0], r(7, 3, 5)),
        2 * 2 * 7 * 3 * GATES,
    ),
    "aten::_cudnn_rnn": (
        by_formula("aten::_cudnn_rnn", (7, 3, 5), [(32, 5), (32, 8), (32,), (32,)]),
        2 * 7 * 3 * GATES,
    ),
    "aten::_cudnn_rnn_backward": (
        by_formula("aten::_cudnn_rnn_backward", (7, 3, 5), [(32, 5), (32, 8)], 4, [True, True, True, True]),
        2 * 2 * 7 * 3 * GATES,
    ),
    "torch_nn::_linear_cross_entropy_batch_chunked": (
        by_formula(
            "torch_nn::_linear_cross_entropy_batch_chunked",
            (10, 4),
            (50, 4),
            (10,),
            None,
            True,
            True,
            True,
            False,
        ),
        3 * 2 * 10 * 4 * 50,
    ),
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": (
        by_formula("torch_nn::_linear_cross_entropy_batch_chunked_no_reduction", (10, 4), (50, 4), (10,)),
        2 * 10 * 4 * 50,
    ),
}
"""By operator what is counted, and what a hand counts."""
NO_PRODUCTS = [name for name, formula in FORMULAS.items() if formula.__name__ == "_no_products"]


def test_every_formula_has_a_hand_count():
    assert HAND_COUNTS.keys() | set(NO_PRODUCTS) == FORMULAS.keys()


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_a_formula_counts_what_a_hand_counts(name):
    count, expected = HAND_COUNTS[name]
    assert count() == expected


@pytest.mark.parametrize(
    ("shape", "kwargs", "expected"),
    [
        ((M, N), {}, 4 * M**2 * N + 8 * M * N**2 + 9 * N**3),
        ((N, M), {"full_matrices": False}, 14 * M * N**2 + 8 * N**3),
    ],
)
def test_singular_vectors_count_as_many_as_are_wanted(shape, kwargs, expected):
    assert counted(torch.linalg.svd, r(*shape), **kwargs) == expected


def test_singular_and_eigenvalues_alone_count_less():
    # the functions of torch.linalg want vectors too whenever a mode such as the counter is on
    assert counted(aten._linalg_svd, r(M, N), compute_uv=False) == 4 * M * N**2 - 4 * N**3 // 3
    assert counted(aten._linalg_eigh, positive(N), compute_v=False) == 4 * N**3 // 3
    assert FORMULAS["aten::linalg_pinv"]((N, N), hermitian=True) == 9 * N**3 + 2 * N**3


@pytest.mark.parametrize(("mode", "formed"), [("r", 0), ("complete", 4 * M * M * N - 36 * N**2 + 288)])
def test_q_counts_only_as_far_as_it_is_formed(mode, formed):
    assert counted(torch.linalg.qr, r(M, N), mode=mode) == TALL + formed


def test_least_squares_by_singular_values_count_those():
    flops = counted(torch.linalg.lstsq, r(M, N), r(M, 4), driver="gelsd")
    assert flops == 14 * M * N**2 + 8 * N**3 + 2 * 4 * N * (M + N)


def test_the_gradients_of_a_bilinear_layer_count_the_products_with_sums():
    # gradient of the left rows: the matrix times the right rows, for each output and each left row; of the
    # right rows: left rows times the matrix; of the matrix: left rows times right rows. Gradients of the
    # output are multiplied in element by element.
    assert bilinear("backward") == 3 * (3 * 2 * 7 * 4 * 5)


def test_cudnn_computes_no_weight_gradients_where_the_mask_wants_none():
    weights = [(32, 5), (32, 8), (32,), (32,)]
    mask = [True, True, True, False]
    assert FORMULAS["aten::_cudnn_rnn_backward"]((7, 3, 5), weights, 4, mask) == 2 * 7 * 3 * GATES


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_operators_that_multiply_no_matrices_count_nothing(name):
    assert FORMULAS[name]((3, 4), (4, 5), out_shape=(3, 5)) == 0


def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a head's logits, a few rows at a time."""
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    chosen = options.LinearCrossEntropyOptions(batch_chunk_size=4, allow_retain_graph=True)
    targets = torch.arange(len(hidden)) % len(weight)
    return nn.functional.linear_cross_entropy(hidden, weight, targets, options=chosen)


def spd(w: torch.Tensor) -> torch.Tensor:
    return w @ w.T + torch.eye(len(w))


FUNCTIONS = {
    "matrix_exp": lambda x, w: torch.matrix_exp(w),
    "inv": lambda x, w: torch.linalg.inv(w),
    "qr": lambda x, w: torch.linalg.qr(w)[0],
    "cholesky": lambda x, w: torch.linalg.cholesky(spd(w)),
    "cholesky_solve": lambda x, w: torch.cholesky_solve(x.T, spd(w)),
    "solve": lambda x, w: torch.linalg.solve(w, x.T),
    "lstsq": lambda x, w: torch.linalg.lstsq(w, x.T).solution,
    "det": lambda x, w: torch.linalg.det(w),
    "slogdet": lambda x, w: torch.linalg.slogdet(spd(w))[1],
    "svd": lambda x, w: torch.linalg.svd(w)[1],
    "svdvals": lambda x, w: torch.linalg.svdvals(w),
    "eigh": lambda x, w: torch.linalg.eigh(spd(w))[0],
    "pinv": lambda x, w: torch.linalg.pinv(w),
    "fft2": lambda x, w: torch.fft.fft2(w).abs(),
    "rfft": lambda x, w: torch.fft.irfft(torch.fft.rfft(w) * 2),
    "pdist": lambda x, w: torch.pdist(w),
    "cdist of few rows": lambda x, w: torch.cdist(x, w),
    "cdist of many rows": lambda x, w: torch.cdist(torch.cat([w, x, x, x, x]), w),
    "chunked cross-entropy": chunked,
}


class Applied(nn.Module):
    """A function of the batch and of one well-conditioned matrix."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.weight = function, nn.Parameter(torch.eye(12) + 0.1 * torch.randn(12, 12))

    def forward(self, x):
        return self.function(x, self.weight).square().mean()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_predicted_is_what_compiled_code_runs(name):
    model, batch = Applied(FUNCTIONS[name]), {"x": r(8, 12)}
    costs = backward_costs(model, batch)
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    compiled(**batch).backward()
    with count_flops() as counter:
        compiled(**batch).backward()
    assert 0 < costs.forward_flops < costs.full_flops
    assert counter.get_total_flops() == costs.full_flops > 0


class Recurrent(nn.Module):
    """Linear, recurrent, linear."""

    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.before, self.recurrent = nn.Linear(5, 6), kind(6, 8, batch_first=True, **options)
        self.after = nn.LazyLinear(3)

    def forward(self, x):
        return self.after(self.recurrent(self.before(x))[0]).square().mean()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 4}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"num_layers": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_cost_what_their_kernels_take_whatever_is_trained(kind, options):
    model, batch = Recurrent(kind, **options), {"x": r(2, 4, 5)}
    model(**batch)
    costs = backward_costs(model, batch)
    for trained in (costs.fqns, {"recurrent.weight_hh_l0"}, {"recurrent.bias_ih_l0"}, {"after.weight"}):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        with count_flops() as counter:
            model(**batch).backward()
        assert counter.get_total_flops() == costs.step_flops(trained)


def test_one_weight_of_an_lstm_costs_its_whole_backward():
    model, batch = Recurrent(nn.LSTM), {"x": r(2, 4, 5)}
    model(**batch)
    costs = backward_costs(model, batch)
    recurrent = {name for name in costs.fqns if name.startswith("recurrent.")}
    assert len({costs.step_flops({name}) for name in recurrent}) == 1
    assert costs.step_flops(recurrent) == costs.step_flops({"recurrent.weight_hh_l0"})


@pytest.fixture(autouse=True)
def _fresh():
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        yield
