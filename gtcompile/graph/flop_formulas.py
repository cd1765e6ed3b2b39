"""FLOP formulas for operators that torch's registry lacks.

Each formula takes the arguments of its operator, with shapes in place of tensors, and `out_shape`, the shapes
of the results. It returns FLOPs, 2 per multiply-add. Complex numbers count like real ones, as in torch's own
formulas. If the number of operations depends on values (in an eigenvalue solver, for example), the formula is
taken from the literature:

* GVL: Golub and Van Loan, Matrix Computations, 4th edition.
* LAWN 41: Blackford and Dongarra, LAPACK Working Note 41, "Installation Guide for LAPACK", appendix C.
"""

from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

Shape = tuple[int, ...]
Formula = Callable[..., int]


def _no_products(*_: Any, **__: Any) -> int:
    """Elementwise operators count no FLOPs, as in torch's own formulas."""
    return 0


# Products of matrices and vectors


def _product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """`left @ right`; the matrices may be batched or have 8-bit elements."""
    return 2 * prod(left) * right[-1]


def _product_with_transposed(rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """`rows @ weight.T`, as a linear layer multiplies."""
    return 2 * prod(rows) * weight[0]


def _product_to_output(left: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Every element of the output is a dot product as long as the rows on the left."""
    return 2 * prod(out_shape) * left[-1]


def _added_product(base: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return _product(left, right)


def _product_of_scaled(left: Shape, code: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """`left @ right.T`; the argument between them is a second encoding of the left matrix."""
    return _product_with_transposed(left, right)


def _matrix_vector(matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(base: Shape, matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _dot(left: Shape, right: Shape, **_: Any) -> int:
    return 2 * prod(left)


def _outer(base: Shape, left: Shape, right: Shape, **_: Any) -> int:
    return 2 * prod(left) * prod(right)


def _products(left: Sequence[Shape], right: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(map(_product, left, right))


def _linear_backward(
    rows: Shape, grad: Shape, weight: Shape, output_mask: Sequence[bool], *_: Any, **__: Any
) -> int:
    """Gradients of rows and weight, each only if its mask is set. The bias gradient takes no FLOPs."""
    return 2 * prod(rows) * weight[0] * (bool(output_mask[0]) + bool(output_mask[1]))


def _product_with_packed(rows: Shape, packed: Shape, shape: Sequence[int], *_: Any, **__: Any) -> int:
    """The weight is packed in 4 bits; the argument `shape` is its true shape, (out, in)."""
    return 2 * prod(rows) * shape[0]


def _packed_matmul(rows: Shape, packed: Shape, block: int, features: int, out: int, **_: Any) -> int:
    return 2 * prod(rows) * out


def _grouped_matmul(left: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Each row is multiplied by the matrix of its group; two matrices contract over the grouped dimension."""
    if len(left) == 2 and len(right) == 2:
        return 2 * prod(left) * right[-1]
    return 2 * prod(out_shape) * left[-1]


def _expert_matmul_backward(rows: Shape, experts: Shape, *_: Any, **__: Any) -> int:
    """The operator always computes both gradients, of rows and of experts."""
    return 2 * _product(rows, experts)


def _trilinear(
    first: Shape,
    second: Shape,
    third: Shape,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
    **_: Any,
) -> int:
    """`nn.Bilinear` and its gradients: a product of three tensors, summed over `sumdim`.

    The kernel loops over `unroll_dim`. For each index it multiplies the first two tensors and sums over the
    dimensions that the third lacks; then it multiplies by the third and sums over the rest.
    """
    shapes = [_expanded(s, e) for s, e in ((first, expand1), (second, expand2), (third, expand3))]
    steps = max(shape[unroll_dim] for shape in shapes)
    for shape in shapes:
        shape[unroll_dim] = 1
    early = [dim for dim in sumdim if dim in expand3 and dim != unroll_dim]
    late = [dim for dim in sumdim if dim not in expand3 and dim != unroll_dim]
    both = [1 if dim in early else max(sizes) for dim, sizes in enumerate(zip(*shapes[:2], strict=True))]
    inner = _summed_product(shapes[0], shapes[1], early) + _summed_product(both, shapes[2], late)
    return steps * inner


def _summed_product(left: Sequence[int], right: Sequence[int], summed: Sequence[int]) -> int:
    """A broadcast product, summed over some dimensions. Without a sum it is elementwise: no FLOPs.

    A summed dimension that only one side has is summed before the product, which makes its size 1.
    """
    sizes = enumerate(zip(left, right, strict=True))
    met = (min(pair) if dim in summed else max(pair) for dim, pair in sizes)
    return 2 * prod(met) if summed else 0


def _convolution_over_time(rows: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """`weight` is (kernel, channels in, channels out)."""
    return 2 * prod(out_shape) * prod(weight[:2])


def _embedding_dots(grad: Shape, table: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    """For every index, a dot product of a gradient with a row of the table."""
    return 2 * prod(indices) * table[-1]


def _expanded(shape: Shape, dims: Sequence[int]) -> list[int]:
    """Insert a dimension of size 1 at each of these positions."""
    sizes = list(shape)
    for dim in sorted(dims):
        sizes.insert(dim, 1)
    return sizes


# Attention


def _flash_attention_cpu(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, and scores times values. Several heads of queries may share a head of keys and values."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _flash_attention_cpu_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    """Recomputed scores; gradients of values, scores, queries and keys."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (3 * width + 2 * value[3])


# Distances: a difference of two features, then a multiply-add, for every pair of rows


def _cdist(left: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 3 * prod(out_shape) * left[-1]


def _cdist_backward(grad: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Gradient of the left rows. torch makes a second call, with the sides exchanged, for the right."""
    return 3 * prod(grad) * left[-1]


def _euclidean_distance(left: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """One matrix product; both sides have two more columns, with squared norms and ones."""
    return 2 * prod(out_shape) * (left[-1] + 2)


def _pdist(rows: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 3 * prod(out_shape) * rows[-1]


def _pdist_backward(grad: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    """A pair's gradient is added to one row and subtracted from the other."""
    return 4 * prod(grad) * rows[-1]


# Fourier transforms: 5 n log2(n) for n complex numbers (GVL 1.4), half for real ones


def _fourier(count: int, sizes: Sequence[int], per_number: float) -> int:
    return round(per_number * count * sum(log2(size) for size in sizes))


def _fft_complex(given: Shape, dims: Sequence[int], *_: Any, **__: Any) -> int:
    return _fourier(prod(given), [given[d] for d in dims], 5.0)


def _fft_from_real(given: Shape, dims: Sequence[int], *_: Any, **__: Any) -> int:
    return _fourier(prod(given), [given[d] for d in dims], 2.5)


def _fft_to_real(given: Shape, dims: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    return _fourier(prod(out_shape), [out_shape[d] for d in dims], 2.5)


# Linear algebra on stacks of matrices


def _stack(shape: Shape) -> tuple[int, int, int]:
    """Return the number of matrices, of rows and of columns."""
    return prod(shape[:-2]), shape[-2], shape[-1]


def _lu(matrix: Shape, **_: Any) -> int:
    """Gaussian elimination with pivoting: GVL 3.2, 3.4."""
    count, rows, columns = _stack(matrix)
    long, short = max(rows, columns), min(rows, columns)
    return count * _thirds(3 * long * short**2 - short**3)


def _thirds(thrice: int) -> int:
    """Divide by 3 and round: formulas with thirds omit lower-order terms anyway."""
    return (thrice + 1) // 3


def _two_triangular_solves(factors: Shape, right_elements: int) -> int:
    """Forward and back substitution, for every column (or row) on the right: GVL 3.1."""
    return 2 * right_elements * factors[-1]


def _solve(matrix: Shape, right: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    return _lu(matrix) + _two_triangular_solves(matrix, prod(out_shape[0]))


def _solve_from_lu(factors: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _two_triangular_solves(factors, prod(out_shape))


def _solve_from_cholesky(right: Shape, factor: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _two_triangular_solves(factor, prod(out_shape))


def _triangular_solve(matrix: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Substitution: half a matrix product."""
    return prod(out_shape) * matrix[-1]


def _old_triangular_solve(right: Shape, matrix: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    return prod(out_shape[0]) * matrix[-1]


def _inverse(matrix: Shape, **_: Any) -> int:
    """Torch solves for the identity."""
    return _lu(matrix) + _two_triangular_solves(matrix, prod(matrix))


def _cholesky(matrix: Shape, *_: Any, **__: Any) -> int:
    """GVL 4.2. The LDL factorisation of an indefinite matrix (GVL 4.4) takes the same number."""
    count, size, _columns = _stack(matrix)
    return count * _thirds(size**3)


def _cholesky_inverse(factor: Shape, *_: Any, **__: Any) -> int:
    """LAWN 41, `potri`."""
    count, size, _columns = _stack(factor)
    return count * _thirds(2 * size**3)


def _householder_factors(matrix: Shape, *_: Any, **__: Any) -> int:
    """R, and Q as reflectors: GVL 5.2. A matrix and its transpose take the same number."""
    count, rows, columns = _stack(matrix)
    long, short = max(rows, columns), min(rows, columns)
    wide = 2 * short**2 * long - _thirds(2 * short**3)
    return count * wide


def _form_q(count: int, rows: int, columns: int, reflectors: int) -> int:
    """Q as a matrix, from reflectors: LAWN 41, `orgqr`."""
    thirds = 12 * rows * columns * reflectors - 6 * (rows + columns) * reflectors**2 + 4 * reflectors**3
    return count * _thirds(thirds)


def _qr(matrix: Shape, mode: str = "reduced", **_: Any) -> int:
    count, rows, columns = _stack(matrix)
    reflectors = min(rows, columns)
    formed = {"r": 0, "reduced": reflectors, "complete": rows}[mode]
    return _householder_factors(matrix) + (_form_q(count, rows, formed, reflectors) if formed else 0)


def _householder_product(reflectors: Shape, scales: Shape, **_: Any) -> int:
    count, rows, columns = _stack(reflectors)
    return _form_q(count, rows, columns, scales[-1])


def _multiply_by_q(
    reflectors: Shape, scales: Shape, other: Shape, left: bool = True, *_: Any, **__: Any
) -> int:
    """Reflectors applied to another matrix: LAWN 41, `ormqr`."""
    count, rows, columns = _stack(other)
    along, across = (rows, columns) if left else (columns, rows)
    return count * 2 * across * scales[-1] * (2 * along - scales[-1])


def _singular_values(matrix: Shape, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> int:
    """The Golub-Reinsch algorithm: GVL 8.6, table 8.6.1."""
    count, rows, columns = _stack(matrix)
    m, n = max(rows, columns), min(rows, columns)
    if not compute_uv:
        return count * (4 * m * n**2 - _thirds(4 * n**3))
    if full_matrices:
        return count * (4 * m**2 * n + 8 * m * n**2 + 9 * n**3)
    return count * (14 * m * n**2 + 8 * n**3)


def _pseudoinverse(matrix: Shape, *_: Any, hermitian: bool = False, **__: Any) -> int:
    """An SVD, or an eigendecomposition of a symmetric matrix, and one product of the two factors."""
    count, rows, columns = _stack(matrix)
    factors = _symmetric_eigenvalues(matrix) if hermitian else _singular_values(matrix)
    return factors + count * 2 * rows * columns * min(rows, columns)


def _symmetric_eigenvalues(matrix: Shape, uplo: str = "L", compute_v: bool = True, **_: Any) -> int:
    """The symmetric QR algorithm: GVL 8.3."""
    count, size, _columns = _stack(matrix)
    return count * (9 * size**3 if compute_v else _thirds(4 * size**3))


def _eigenvectors(matrix: Shape, **_: Any) -> int:
    """The QR algorithm with the Schur vectors: GVL 7.5."""
    count, size, _columns = _stack(matrix)
    return count * 25 * size**3


def _eigenvalues(matrix: Shape, **_: Any) -> int:
    """The QR algorithm: GVL 7.5."""
    count, size, _columns = _stack(matrix)
    return count * 10 * size**3


def _least_squares(
    matrix: Shape, right: Shape, rcond: float | None = None, *, driver: str | None = None, **_: Any
) -> int:
    """A QR factorisation, Q applied to the right-hand sides, and a triangular solve: GVL 5.3.

    The drivers `gelsd` and `gelss` use an SVD instead of QR: GVL 5.5.
    """
    count, rows, columns = _stack(matrix)
    sides = right[-1] if len(right) == len(matrix) else 1
    short = min(rows, columns)
    if driver in ("gelsd", "gelss"):
        return _singular_values(matrix) + count * 2 * sides * short * (rows + columns)
    applied = 2 * sides * short * (2 * max(rows, columns) - short)
    return _householder_factors(matrix) + count * (applied + sides * short**2)


def _matrix_exponential(matrix: Shape, **_: Any) -> int:
    """The Taylor polynomial of degree 18, which takes five matrix products.

    Bader, Blanes and Casas, "Computing the matrix exponential with an optimized Taylor polynomial
    approximation", 2019. torch takes fewer products for a small norm, and more (squarings) for a large one.
    """
    count, size, _columns = _stack(matrix)
    return 5 * count * 2 * size**3


# Recurrent kernels. A backward call computes all gradients at once, for every trained set


def _onednn_lstm(given: Shape, by_input: Shape, by_hidden: Shape, *_: Any, **__: Any) -> int:
    """One layer in one direction. Each time step multiplies by the two weights."""
    return 2 * prod(given[:-1]) * (prod(by_input) + prod(by_hidden))


def _onednn_lstm_backward(given: Shape, by_input: Shape, by_hidden: Shape, *_: Any, **__: Any) -> int:
    return 2 * _onednn_lstm(given, by_input, by_hidden)


def _cudnn_recurrent(given: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Every token is multiplied by every weight matrix of every layer and direction."""
    return 2 * prod(given[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _cudnn_recurrent_backward(given: Shape, weights: Sequence[Shape], *args: Any, **_: Any) -> int:
    """Gradients of the inputs; and of all weights, if the mask (the last argument) is set for them."""
    return _cudnn_recurrent(given, weights) * (1 + bool(args[-1][3]))


# Losses


def _chunked_cross_entropy(rows: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    """The forward computes logits, and gradients of rows and weight if the last arguments are set.

    The backward only scales these gradients.
    """
    with_input, with_weight, _with_bias = map(bool, args[-3:])
    return _product_with_transposed(rows, weight) * (1 + with_input + with_weight)


FORMULAS: dict[str, Formula] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash_attention_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_attention_cpu_backward,
    "aten::_scaled_dot_product_fused_attention_overrideable": _flash_attention_cpu,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _flash_attention_cpu_backward,
    "aten::mv": _matrix_vector,
    "aten::addmv": _added_matrix_vector,
    "aten::addmv_": _added_matrix_vector,
    "aten::dot": _dot,
    "aten::vdot": _dot,
    "aten::addr": _outer,
    "aten::addr_": _outer,
    "aten::addmm_": _added_product,
    "aten::addbmm": _added_product,
    "aten::addbmm_": _added_product,
    "aten::baddbmm_": _added_product,
    "aten::_addmm_activation": _added_product,
    "aten::_foreach_mm": _products,
    "aten::linear": _product_with_transposed,
    "aten::linear_backward": _linear_backward,
    "aten::mkldnn_linear": _product_with_transposed,
    "mkldnn::_linear_pointwise": _product_with_transposed,
    "aten::_trilinear": _trilinear,
    "aten::conv_tbc": _convolution_over_time,
    "aten::_embedding_bag_per_sample_weights_backward": _embedding_dots,
    "aten::_grouped_mm": _grouped_matmul,
    "aten::_scaled_grouped_mm": _grouped_matmul,
    "aten::_scaled_grouped_mm_v2": _grouped_matmul,
    "aten::_scaled_mm_v2": _product,
    "aten::_int_mm": _product,
    "aten::_weight_int8pack_mm": _product_with_transposed,
    "aten::_weight_int4pack_mm": _product_to_output,
    "aten::_weight_int4pack_mm_for_cpu": _product_to_output,
    "aten::_weight_int4pack_mm_with_scales_and_zeros": _product_to_output,
    "aten::_dyn_quant_matmul_4bit": _packed_matmul,
    "bitsandbytes::int8_linear_matmul": _product_with_transposed,
    "bitsandbytes::int8_scaled_mm": _product_with_transposed,
    "bitsandbytes::int8_mixed_scaled_mm": _product_of_scaled,
    "bitsandbytes::gemv_4bit": _product_with_packed,
    "bitsandbytes::gemm_4bit": _product_with_packed,
    "torchao::int_matmul": _product,
    "torchao::int_scaled_matmul": _product,
    "transformers::grouped_mm_fallback": _product,
    "transformers::grouped_mm_fallback_backward": _expert_matmul_backward,
    "aten::_cdist_forward": _cdist,
    "aten::_cdist_backward": _cdist_backward,
    "aten::_euclidean_dist": _euclidean_distance,
    "aten::_pdist_forward": _pdist,
    "aten::_pdist_backward": _pdist_backward,
    "aten::_fft_c2c": _fft_complex,
    "aten::_fft_r2c": _fft_from_real,
    "aten::_fft_c2r": _fft_to_real,
    "aten::linalg_lu": _lu,
    "aten::linalg_lu_factor_ex": _lu,
    "aten::_linalg_det": _lu,
    "aten::_linalg_slogdet": _lu,
    "aten::linalg_lu_solve": _solve_from_lu,
    "aten::_linalg_solve_ex": _solve,
    "aten::linalg_solve_triangular": _triangular_solve,
    "aten::triangular_solve": _old_triangular_solve,
    "aten::linalg_inv_ex": _inverse,
    "aten::linalg_cholesky_ex": _cholesky,
    "aten::cholesky": _cholesky,
    "aten::cholesky_solve": _solve_from_cholesky,
    "aten::cholesky_inverse": _cholesky_inverse,
    "aten::linalg_ldl_factor_ex": _cholesky,
    "aten::linalg_ldl_solve": _solve_from_lu,
    "aten::linalg_qr": _qr,
    "aten::geqrf": _householder_factors,
    "aten::linalg_householder_product": _householder_product,
    "aten::ormqr": _multiply_by_q,
    "aten::_linalg_svd": _singular_values,
    "aten::_linalg_eigh": _symmetric_eigenvalues,
    "aten::linalg_eig": _eigenvectors,
    "aten::linalg_eigvals": _eigenvalues,
    "aten::_linalg_eigvals": _eigenvalues,
    "aten::linalg_lstsq": _least_squares,
    "aten::linalg_pinv": _pseudoinverse,
    "aten::linalg_matrix_exp": _matrix_exponential,
    "aten::mkldnn_rnn_layer": _onednn_lstm,
    "aten::mkldnn_rnn_layer_backward": _onednn_lstm_backward,
    "aten::_cudnn_rnn": _cudnn_recurrent,
    "aten::_cudnn_rnn_backward": _cudnn_recurrent_backward,
    "aten::_thnn_fused_lstm_cell": _no_products,
    "aten::_thnn_fused_lstm_cell_backward_impl": _no_products,
    "aten::_thnn_fused_gru_cell": _no_products,
    "aten::_thnn_fused_gru_cell_backward": _no_products,
    "torch_nn::_linear_cross_entropy_batch_chunked": _chunked_cross_entropy,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": _product_with_transposed,
    "bitsandbytes::dequantize_4bit": _no_products,
    "bitsandbytes::dequantize_blockwise": _no_products,
    "bitsandbytes::quantize_4bit": _no_products,
    "bitsandbytes::quantize_blockwise": _no_products,
    "aten::_linalg_check_errors": _no_products,
    "aten::linalg_vector_norm": _no_products,
    "aten::linalg__powsum": _no_products,
    "aten::linalg_cross": _no_products,
    "aten::fft_fftfreq": _no_products,
    "aten::fft_rfftfreq": _no_products,
    "aten::_cudnn_rnn_flatten_weight": _no_products,
}
"""Formulas by operator name. The operators of a library exist only after the library is imported."""
