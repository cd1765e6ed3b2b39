"""Products of float32 matrices on processors for which torch's library has no fast code.

Torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone; oneDNN, which
torch carries too, asks for the instructions and not for the vendor. On an AMD EPYC with AVX-512 it takes
about half the time (`python -m benchmarks.onednn_products`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import register_flop_formula

from gtcompile.graph.flops import node_flops
from gtcompile.torch_internals import (
    CustomGraphPass,
    get_hash_for_files,
    inductor_config,
    statically_known_true,
    sym_eq,
)

aten = torch.ops.aten

LEAST_FLOPS = 10_000_000
"""Below, calling oneDNN costs more than it wins: some ten microseconds."""

_library = torch.library.Library("gtcompile", "DEF")
_library.define("product(Tensor left, Tensor right, Tensor? bias=None) -> Tensor")


@torch.library.impl(_library, "product", "CPU")
def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right`, of shapes (m, k) and (k, n), plus a bias of shape (n,), by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return product


@torch.library.impl(_library, "product", "Meta")
def _product_shape(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


PRODUCT = torch.ops.gtcompile.product.default
"""`aten.mm`, or `aten.addmm` with a vector, of float32 matrices on the CPU."""


@register_flop_formula(torch.ops.gtcompile.product)
def _product_flops(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL here, by what each has code for.

    Never where the user has `torch.backends.mkldnn` disabled, which is how to turn it off.
    """
    return (
        bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available() and _mkl_lacks_avx512()
    )


@functools.cache
def _mkl_lacks_avx512() -> bool:
    """Whether torch multiplies with MKL on a processor that has AVX-512 and is not Intel's."""
    processor = torch.cpu.get_capabilities()
    others = "Intel" not in processor.get("cpu_name", "Intel")
    return torch.backends.mkl.is_available() and others and bool(processor.get("avx512_f"))


def use_faster_products(graph: fx.Graph) -> None:
    """Have oneDNN compute the matrix products of a graph where it is faster.

    Before: `y = addmm(bias, x, w)`
    After:  `y = product(x, w, bias)`

    Sound because both are the same sums of the same products, in another order.

    Args:
        graph: of operators, with the metadata of AOTAutograd; changed in place.
    """
    if not onednn_is_faster():
        return
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        if _is_worth_it(node):
            node.target = PRODUCT
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, left, right = node.args
        if _is_worth_it(node) and _is_row_of(node, bias) and not node.kwargs:
            node.target, node.args = PRODUCT, (left, right, bias)


def _is_worth_it(node: fx.Node) -> bool:
    """Whether this is a large product of float32 matrices on the CPU, at the sizes it was captured with."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    ours = all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 and v.is_cpu for v in values)
    return ours and node_flops(node) >= LEAST_FLOPS


def _is_row_of(node: fx.Node, bias: Any) -> bool:
    """Whether a bias is a vector with one element for each column of a product, and not broadcast."""
    return statically_known_true(sym_eq(bias.meta["val"].shape, node.meta["val"].shape[1:]))


class _FasterProducts(CustomGraphPass):
    """The rewriting as a pass of Inductor, known by its `uuid` to its cache on disk."""

    def __call__(self, graph: fx.Graph) -> None:
        use_faster_products(graph)

    def uuid(self) -> tuple[bytes, int]:
        return get_hash_for_files((__file__,)), LEAST_FLOPS


def inductor_settings() -> dict[str, Any]:
    """What has Inductor use the faster products; nothing where the user has a pass of their own there."""
    taken = inductor_config.post_grad_custom_pre_pass is not None
    return {} if taken or not onednn_is_faster() else {"post_grad_custom_pre_pass": _FasterProducts()}
