"""Multiply float32 matrices with oneDNN on processors for which MKL, torch's default, has no fast code.

MKL uses AVX-512 only on Intel processors. oneDNN, which torch also contains, uses it on every processor that
has it. On an AMD EPYC it takes about half the time (`python -m benchmarks.onednn_products`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import register_flop_formula

from gtcompile.graph.flops import node_flops
from gtcompile.passes.contract import G, graph_pass
from gtcompile.torch_internals import (
    CustomGraphPass,
    get_hash_for_files,
    inductor_config,
    statically_known_true,
    sym_eq,
)

aten = torch.ops.aten

LEAST_FLOPS = 10_000_000
"""Minimum FLOPs of a product. Below, the call overhead of oneDNN (about 10 us) exceeds the savings."""

_library = torch.library.Library("gtcompile", "DEF")
_library.define("product(Tensor left, Tensor right, Tensor? bias=None) -> Tensor")


@torch.library.impl(_library, "product", "CPU")
def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `left @ right`, of shapes (m, k) and (k, n), plus a bias of shape (n,), with oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return product


@torch.library.impl(_library, "product", "Meta")
def _product_shape(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


PRODUCT = torch.ops.gtcompile.product.default
"""Replacement for `aten.mm`, and for `aten.addmm` with a vector, on float32 CPU matrices."""


@register_flop_formula(torch.ops.gtcompile.product)
def _product_flops(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL on this processor.

    The answer follows from the instruction sets that each supports; nothing is measured. It is False if
    `torch.backends.mkldnn` is disabled: this is how users turn the pass off.
    """
    return (
        bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available() and _mkl_lacks_avx512()
    )


@functools.cache
def _mkl_lacks_avx512() -> bool:
    """Whether torch uses MKL on a processor that has AVX-512 and is not made by Intel."""
    processor = torch.cpu.get_capabilities()
    others = "Intel" not in processor.get("cpu_name", "Intel")
    return torch.backends.mkl.is_available() and others and bool(processor.get("avx512_f"))


@graph_pass
def use_onednn_products(given: G) -> None:
    """Compute large matrix products with oneDNN if it is faster on this processor.

    Before: `y = addmm(bias, x, w)`
    After:  `y = product(x, w, bias)`

    Sound because both compute the same sums, in another order: only rounding may differ.
    """
    _use_onednn(given.graph)


def _use_onednn(graph: fx.Graph) -> None:
    """Edit a graph in place, as Inductor requires of its custom passes."""
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
    """Whether a node is a large product of float32 CPU matrices, at the captured sizes."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    fits = all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 and v.is_cpu for v in values)
    return fits and node_flops(node) >= LEAST_FLOPS


def _is_row_of(node: fx.Node, bias: Any) -> bool:
    """Whether a bias is a vector with one element per column of the product, without broadcasting."""
    return statically_known_true(sym_eq(bias.meta["val"].shape, node.meta["val"].shape[1:]))


class _InductorPass(CustomGraphPass):
    """The rewrite as an Inductor pass. `uuid` is its key in Inductor's disk cache."""

    def __call__(self, graph: fx.Graph) -> None:
        _use_onednn(graph)

    def uuid(self) -> tuple[bytes, int]:
        return get_hash_for_files((__file__,)), LEAST_FLOPS


def inductor_settings() -> dict[str, Any]:
    """Inductor settings that enable this pass; empty if the user has set a custom pass there."""
    taken = inductor_config.post_grad_custom_pre_pass is not None
    return {} if taken or not onednn_is_faster() else {"post_grad_custom_pre_pass": _InductorPass()}
