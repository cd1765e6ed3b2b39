"""FLOPs of one graph node, 2 per multiply-add, by the formulas of `torch.utils.flop_counter`.

Importing this module registers the formulas torch lacks (CPU flash attention, matrix-vector products, grouped
products) in torch's own registry, so `FlopCounterMode` counts what gtcompile predicts.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
)

from gtcompile.errors import CaptureError
from gtcompile.torch_internals import (
    CountingMode,
    FakeTensor,
    FunctionalTensor,
    HigherOrderOperator,
    OpOverload,
    tree_map,
)

aten = torch.ops.aten
Shape = tuple[int, ...]


def _matrix_vector(matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(base: Shape, matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _dot(left: Shape, right: Shape, **_: Any) -> int:
    return 2 * prod(left)


def _outer(base: Shape, left: Shape, right: Shape, **_: Any) -> int:
    return 2 * prod(left) * prod(right)


def _summed_batch_matmul(base: Shape, left: Shape, right: Shape, **_: Any) -> int:
    return 2 * prod(left) * right[-1]


def _flash_attention_cpu(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values; keys and values may have fewer heads, and serve several."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _flash_attention_cpu_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    """Scores anew, then gradients: of scores and values at one width, of queries and keys at the other."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (3 * width + 2 * value[3])


def _triangular_solve(matrix: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Substitution: half a matrix product."""
    return prod(out_shape) * matrix[-1]


def _grouped_matmul(left: Shape, right: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Every row meets one group's matrix; a pair of matrices contracts over the grouped dimension."""
    if len(left) == 2 and len(right) == 2:
        return 2 * prod(left) * right[-1]
    return 2 * prod(out_shape) * left[-1]


def _expert_matmul(rows: Shape, experts: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(rows) * experts[-1]


def _expert_matmul_backward(rows: Shape, experts: Shape, *_: Any, **__: Any) -> int:
    """One operator computes the gradients of rows and experts, whichever is wanted."""
    return 2 * _expert_matmul(rows, experts)


MISSING_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash_attention_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_attention_cpu_backward,
    "aten::mv": _matrix_vector,
    "aten::addmv": _added_matrix_vector,
    "aten::dot": _dot,
    "aten::vdot": _dot,
    "aten::addr": _outer,
    "aten::addbmm": _summed_batch_matmul,
    "aten::_grouped_mm": _grouped_matmul,
    "aten::linalg_solve_triangular": _triangular_solve,
    "transformers::grouped_mm_fallback": _expert_matmul,
    "transformers::grouped_mm_fallback_backward": _expert_matmul_backward,
}
"""What torch 2.13's registry lacks, by qualified operator name; libraries define theirs when they are
imported."""


def register_missing_formulas() -> None:
    """Add the missing formulas to torch's registry, leaving alone what it has by now."""
    for qualified_name, formula in MISSING_FORMULAS.items():
        namespace, _, name = qualified_name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None and packet not in flop_registry:
            register_flop_formula(packet)(formula)


register_missing_formulas()


RUN_RANDOM_OPERATORS = {"run_and_save_rng_state": 0, "run_with_rng_state": 1}
"""Operators that run another one, with random numbers to be drawn again; its position among their arguments.
Recomputed attention is run by them, on a CPU whether or not it drops anything."""


def _runs_random_operator(target: object) -> bool:
    return isinstance(target, HigherOrderOperator) and target.name() in RUN_RANDOM_OPERATORS


class _CountingCompiledCode(CountingMode):
    """Counts inside compiled code instead of having `torch.compile` step aside."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch.compile to go on working under this mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator, unless it is only traced while something is compiled."""
        kwargs = kwargs or {}
        if any(issubclass(kind, (FakeTensor, FunctionalTensor)) for kind in types):
            return func(*args, **kwargs)
        if _runs_random_operator(func):
            position = RUN_RANDOM_OPERATORS[func.name()]
            result = func(*args, **kwargs)
            self.counter._count_flops(args[position]._overloadpacket, result, args[position + 1 :], kwargs)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count FLOPs as `FlopCounterMode` does, compiled regions included.

    Read `counter.get_total_flops()` afterwards.

    Inside torch's own context manager `torch.compile` runs the model eagerly, so that it counts another
    program than the one in use. What is traced while a step compiles does not run and is not counted.
    """
    register_missing_formulas()
    counter = FlopCounterMode(display=False)
    with _CountingCompiledCode(counter):
        yield counter


MATMUL_LIKE = re.compile(
    r"(^|_)(mm|bmm|matmul|conv(?!ert)\w*|linear|attention|rnn|gru|lstm|bilinear|trilinear|cdist|einsum|solve)($|_)"
)
"""Names of aten operators whose work must not be taken for zero."""
NOT_MATMUL = re.compile(r"_(pad|logical|shape)")


def node_flops(node: fx.Node) -> int:
    """FLOPs of running this node once at the shapes it was captured with.

    Raises:
        CaptureError: for a matmul-like operator without a formula.
    """
    if not isinstance(node.target, OpOverload):
        return _higher_order_flops(node)
    formula = flop_registry.get(node.target.overloadpacket)
    if formula is None:
        _refuse_unknown_matmul(node)
        return 0
    args, kwargs = _arguments(node)
    return int(formula(*args, **kwargs, out_val=_concrete(node.meta["val"])))


def has_flops(node: fx.Node) -> bool:
    """Whether running this node takes FLOPs, known or not."""
    try:
        return node.op == "call_function" and node_flops(node) > 0
    except CaptureError:
        return True


def known_flops(node: fx.Node) -> int:
    """FLOPs to compare ways of running a graph; an operator without a formula costs one per element it makes.

    Never to be reported: training an operator needs no formula, a cost does.
    """
    try:
        return node_flops(node)
    except CaptureError:
        made = _concrete(node.meta["val"])
        results = made if isinstance(made, (tuple, list)) else [made]
        return max(1, sum(result.numel() for result in results if isinstance(result, torch.Tensor)))


def output_flops(node: fx.Node) -> dict[int, int]:
    """FLOPs each output of a masked multi-output backward operator asks for by itself; empty for other nodes.

    A convolution's backward computes the gradients of input, weight and bias independently, as its mask says.
    """
    if node.target is not aten.convolution_backward.default:
        return {}
    args, kwargs = _arguments(node)
    formula, mask = flop_registry[aten.convolution_backward], args[-1]
    flops = {}
    for index in (i for i, wanted in enumerate(mask) if wanted):
        only = [i == index for i in range(len(mask))]
        kept = tuple(value if i == index else None for i, value in enumerate(_concrete(node.meta["val"])))
        flops[index] = int(formula(*args[:-1], only, **kwargs, out_val=kept))
    return flops


def _higher_order_flops(node: fx.Node) -> int:
    target, args, kwargs = node.target, *_arguments(node)
    if _runs_random_operator(target):
        position = RUN_RANDOM_OPERATORS[target.name()]  # type: ignore[union-attr]
        target, args = args[position]._overloadpacket, args[position + 1 :]
    formula = flop_registry.get(target) if node.op == "call_function" else None
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=_concrete(node.meta.get("val"))))


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the node is called with, fake tensors for nodes, sizes as they were when captured."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))
    return _concrete(args), _concrete(kwargs)


def _concrete(value: Any) -> Any:
    """The same with every symbolic size replaced by the size it was captured with.

    A formula computing with symbolic sizes would make the compiled code hold for these sizes alone.
    """
    return tree_map(_concrete_leaf, value)


def _concrete_leaf(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        return torch.empty([_concrete_leaf(size) for size in value.shape], dtype=value.dtype, device="meta")
    return value


def _refuse_unknown_matmul(node: fx.Node) -> None:
    assert isinstance(node.target, OpOverload)
    namespace, _, name = node.target.overloadpacket._qualified_op_name.partition("::")
    if namespace in ("aten", "prims"):
        suspicious = MATMUL_LIKE.search(name) is not None and NOT_MATMUL.search(name) is None
    else:
        suspicious = sum(_is_float_matrix(argument) for argument in node.all_input_nodes) >= 2
    if suspicious:
        raise CaptureError(
            f"operator {node.target} does matmul-like work and has no FLOP formula: no cost would be true. "
            f"Register one: torch.utils.flop_counter.register_flop_formula(torch.ops.{namespace}.{name})."
        )


def _is_float_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2
