"""FLOPs of graph nodes, 2 per multiply-add.

Formulas come from `torch.utils.flop_counter`, from `flop_formulas` and from users. All are in torch's own
registry, so `FlopCounterMode` counts what gtcompile predicts. A node without a formula has no FLOPs, unless
it seems to do matmul-like work: then its FLOPs are unknown, and the cost functions refuse it.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gtcompile.errors import CaptureError
from gtcompile.graph.flop_registry import register_missing_formulas
from gtcompile.torch_internals import (
    CountingMode,
    FakeTensor,
    FunctionalTensor,
    HigherOrderOperator,
    OpOverload,
    dense_kernel,
)

aten = torch.ops.aten


class Call(NamedTuple):
    """One operator call: the arguments of a FLOP formula."""

    operator: Any
    """Key in torch's registry: an overload packet, or a higher-order operator."""
    args: tuple[Any, ...]
    """Positional arguments."""
    kwargs: dict[str, Any]
    """Keyword arguments."""
    result: Any
    """Return value."""

    @property
    def flops(self) -> int:
        """FLOPs by the registered formula; 0 without one."""
        formula = flop_registry.get(self.operator)
        return 0 if formula is None else int(formula(*self.args, **self.kwargs, out_val=self.result))


RUN_RANDOM_OPERATORS = {
    "run_and_save_rng_state": 0,
    "run_with_rng_state": 1,
    "graphsafe_run_with_rng_state": 0,
}
"""Higher-order operators that run a random operator, with the position of that operator in their arguments.
Activation checkpointing runs recomputed attention through them, with or without dropout."""
EFFECTS = "with_effects"
"""Higher-order operator that runs another operator in a fixed order. It takes a token, that operator and its
arguments; it returns a token and the results."""


def _unwrapped(call: Call) -> Call:
    """Return the call inside a higher-order operator that runs another operator; any other call unchanged."""
    name = call.operator.name() if isinstance(call.operator, HigherOrderOperator) else None
    result = call.result
    if name == EFFECTS:
        position = 1
        if isinstance(result, (tuple, list)):
            result = result[1] if len(result) == 2 else result[1:]
    elif name in RUN_RANDOM_OPERATORS:
        position = RUN_RANDOM_OPERATORS[name]
        result = result[1] if name == "run_and_save_rng_state" and result is not None else result
    else:
        return call
    kwargs = {key: value for key, value in call.kwargs.items() if key != "rng_state"}
    return Call(call.args[position].overloadpacket, call.args[position + 1 :], kwargs, result)


class _CountingCompiledCode(CountingMode):
    """Counts FLOPs inside compiled code. Under torch's own mode, `torch.compile` falls back to eager."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True, so that torch.compile stays active under this mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator, unless it runs on fake tensors: then a compiler only traces it."""
        kwargs = kwargs or {}
        if any(issubclass(kind, (FakeTensor, FunctionalTensor)) for kind in types):
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            return self._run_higher_order(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def _run_higher_order(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a higher-order operator and count the operators in it; torch's mode supports few of these."""
        runs_one = func.name() in RUN_RANDOM_OPERATORS or func.name() == EFFECTS
        if runs_one or func in self.counter.flop_registry:
            result = func(*args, **kwargs)
            call = _unwrapped(Call(func, args, kwargs, result))
            self.counter._count_flops(call.operator, call.result, call.args, call.kwargs)
            return result
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if result is not NotImplemented:
            return result
        kernel = dense_kernel(func)
        if kernel is None:
            return func(*args, **kwargs)
        with self:  # it runs its subgraphs operator by operator
            return kernel(*args, **kwargs)


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count FLOPs as `FlopCounterMode` does, but inside compiled code too.

    Under torch's own context manager, `torch.compile` falls back to eager and another program is counted.
    Operators that are only traced during compilation are not counted.

    Yields:
        The counter; read `get_total_flops()` after the block. FLOPs are 2 per multiply-add.
    """
    register_missing_formulas()
    counter = FlopCounterMode(display=False)
    with _CountingCompiledCode(counter):
        yield counter


MATMUL_LIKE = re.compile(
    r"(^|_)([a-z0-9]*mm|[a-z]*mv|gem[mv]|ger|addr|outer|inner|[v]?dot|matmul|kron|q?conv(?!ert)\w*|q?linear|bilinear|"
    r"trilinear|attention|transformer|rnn|gru|lstm|[cp]dist|euclidean_dist|einsum|tensordot|fft|linalg|svd|qr|"
    r"eigh?|eigvalsh?|cholesky|inverse|inv|pinv|det|slogdet|lu|ldl|lstsq|[a-z]*solve|householder|matrix_exp|geqrf|"
    r"or[gm]qr)($|_)"
)
"""Names of operators that must have a formula: products, factorisations, transforms."""
NOT_MATMUL = re.compile(r"_(pad|logical|shape)|reorder|prepack|flatten|lu_unpack|slice_inverse|vector_norm")
"""Exceptions: operators that match, but only arrange or check their arguments."""


def node_flops(node: fx.Node) -> int:
    """Return the FLOPs of running a node once, at the captured shapes.

    Raises:
        CaptureError: the node does matmul-like work and has no formula.
    """
    if _formula_of(node) is not None:
        return _call_of(node).flops
    if _needs_formula(node):
        refuse_unknown([node])
    return max((sum(map(node_flops, _calls_in(graph))) for graph in _subgraphs(node)), default=0)


def planning_flops(node: fx.Node) -> int:
    """Estimate the FLOPs of a node, to choose between ways of running a graph.

    An operator without a formula counts one FLOP per element of its result, so that training works without
    formulas. Do not report this number: reported costs must be exact (`node_flops`).
    """
    if not is_unknown(node):
        return node_flops(node)
    made = _concrete(node.meta["val"])
    results = made if isinstance(made, (tuple, list)) else [made]
    return max(1, sum(result.numel() for result in results if isinstance(result, torch.Tensor)))


def has_flops(node: fx.Node) -> bool:
    """Whether running a node takes FLOPs, known or unknown."""
    return node.op == "call_function" and (is_unknown(node) or node_flops(node) > 0)


FORWARD_GRADIENTS = {"torch_nn::_linear_cross_entropy_batch_chunked": {1: -3, 2: -2, 3: -1}}
"""Operators whose forward computes gradients, which the backward only scales. By the operator's name: the
position of each gradient among its outputs, and that of the gradient's flag among its arguments."""


def forward_gradients(node: fx.Node) -> dict[int, int]:
    """Return the gradients that an operator computes in its forward, as `FORWARD_GRADIENTS` has them."""
    if not isinstance(node.target, OpOverload):
        return {}
    return FORWARD_GRADIENTS.get(str(node.target.overloadpacket._qualified_op_name), {})


def output_flops(node: fx.Node) -> dict[int, int]:
    """Split by output the FLOPs of an operator that computes gradients independently; empty for other nodes.

    A convolution's backward computes the gradients of input, weight and bias, each only if its mask is set.
    Cross-entropy in chunks computes the loss, and each gradient only if its flag is set.

    Returns:
        From the position of each computed output to its FLOPs.
    """
    if flags := forward_gradients(node):
        return _flops_by_flag(_call_of(node), flags)
    if node.target is not aten.convolution_backward.default:
        return {}
    call = _call_of(node)
    mask = call.args[-1]
    flops = {}
    for index in (i for i, wanted in enumerate(mask) if wanted):
        only = [i == index for i in range(len(mask))]
        kept = tuple(value if i == index else None for i, value in enumerate(call.result))
        flops[index] = call._replace(args=(*call.args[:-1], only), result=kept).flops
    return flops


def _flops_by_flag(call: Call, flags: Mapping[int, int]) -> dict[int, int]:
    def flops(*wanted: int) -> int:
        args = list(call.args)
        for position in flags.values():
            args[position] = args[position] and position in wanted
        return call._replace(args=tuple(args)).flops

    always = flops()
    return {0: always} | {output: flops(position) - always for output, position in flags.items()}


def is_unknown(node: fx.Node) -> bool:
    """Whether a node does matmul-like work and has no formula."""
    return _formula_of(node) is None and _needs_formula(node)


def _needs_formula(node: fx.Node) -> bool:
    """Whether a node without formula does matmul-like work."""
    if node.op != "call_function":
        return False
    subgraphs = _subgraphs(node)
    if not subgraphs:
        return _does_matmul_like_work(node)
    is_refused = is_unknown if node.target in RUNS_ONE_SUBGRAPH else has_flops
    return any(is_refused(call) for graph in subgraphs for call in _calls_in(graph))


def refuse_unknown(nodes: Iterable[fx.Node]) -> None:
    """Raise one error for all nodes with unknown FLOPs.

    Raises:
        CaptureError: lists every such operator, and how to register its formula.
    """
    unknown = Counter(_name_of(node) for node in nodes if is_unknown(node))
    if not unknown:
        return
    called = ", ".join(f"{name} ({calls}x)" for name, calls in unknown.items())
    how = "; ".join(f"gtcompile.register_flops(torch.ops.{name}, formula)" for name in unknown)
    raise CaptureError(
        f"no FLOP formula is known for these operators, which do matmul-like work: {called}. Without them "
        f"costs would be wrong. Register a function from the shapes of an operator's arguments to FLOPs, 2 "
        f"per multiply-add: {how}."
    )


RUNS_ONE_SUBGRAPH = (torch.ops.higher_order.cond, torch.ops.higher_order.invoke_subgraph)
"""Operators that run one of their subgraphs once. They count as their costliest subgraph, as in torch's
counter. Other operators run a subgraph, such as a loop body, an unknown number of times."""


def _subgraphs(node: fx.Node) -> list[fx.Graph]:
    """Return the subgraphs among the arguments of a higher-order operator."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    owner, names = node.graph.owning_module, [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    values = [getattr(owner, str(name), None) for name in names]
    return [value.graph for value in values if isinstance(value, fx.GraphModule)]


def _calls_in(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _formula_of(node: fx.Node) -> Callable[..., int] | None:
    """Return the FLOP formula of a node, or of the operator that it runs."""
    formula: Callable[..., int] | None = flop_registry.get(_key_of(node.target))
    if formula is None and isinstance(node.target, HigherOrderOperator):
        formula = flop_registry.get(_key_of(_operator_run_by(node)))
    return formula


def _key_of(target: object) -> object:
    """Return the key of an operator in torch's registry, which does not distinguish overloads."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _operator_run_by(node: fx.Node) -> OpOverload | None:
    """Return the operator that a higher-order node runs: the first operator among its arguments."""
    return next((argument for argument in node.args if isinstance(argument, OpOverload)), None)


def _does_matmul_like_work(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        target = _operator_run_by(node) or target
    if isinstance(target, OpOverload):
        namespace, _, name = target.overloadpacket._qualified_op_name.partition("::")
        return is_matmul_like(name) or (namespace not in ("aten", "prims") and _reads_two_matrices(node))
    return isinstance(target, HigherOrderOperator) and _reads_two_matrices(node)


@functools.cache
def is_matmul_like(name: str) -> bool:
    """Whether the name is that of a matrix product or a comparable operator."""
    return MATMUL_LIKE.search(name) is not None and NOT_MATMUL.search(name) is None


def _reads_two_matrices(node: fx.Node) -> bool:
    return sum(map(_is_float_matrix, node.all_input_nodes)) >= 2


def _is_float_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2


def _name_of(node: fx.Node) -> str:
    """Return the operator's name below `torch.ops`: `aten.mm`, `higher_order.cond`."""
    target = _operator_run_by(node) or node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket._qualified_op_name).replace("::", ".")
    return f"higher_order.{target.name()}" if isinstance(target, HigherOrderOperator) else str(target)


def _call_of(node: fx.Node) -> Call:
    """Return the call that a node makes, with fake tensors for nodes and captured sizes for symbolic ones."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))
    result = _concrete(node.meta.get("val"))
    return _unwrapped(Call(_key_of(node.target), _concrete(args), _concrete(kwargs), result))


def _concrete(value: Any) -> Any:
    """Replace every symbolic size in nested values by the captured size.

    Computing with symbolic sizes would add guards, and the compiled code would serve the captured sizes only.
    """
    if isinstance(value, torch.Tensor):
        return _concrete_tensor(value)
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(_concrete, value))
    if isinstance(value, dict):
        return {key: _concrete(each) for key, each in value.items()}
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _concrete_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if not any(isinstance(size, torch.SymInt) for size in tensor.shape):
        return tensor
    return torch.empty(_concrete(tuple(tensor.shape)), dtype=tensor.dtype, device="meta")
