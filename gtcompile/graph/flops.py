"""FLOPs of graph nodes, 2 per multiply-add: counted by a formula, known to be none, or refused.

The formulas are those of `torch.utils.flop_counter`, those of `flop_formulas` and those that users register.
All are in torch's own registry, so `FlopCounterMode` counts what gtcompile predicts.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gtcompile.errors import CaptureError
from gtcompile.graph.flop_registry import register_missing_formulas as register_missing_formulas
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
    """A call of an operator: what a formula needs to know."""

    operator: Any
    """As a key of torch's registry: all overloads together, or a higher-order operator."""
    args: tuple[Any, ...]
    """Positional arguments."""
    kwargs: dict[str, Any]
    """Keyword arguments."""
    result: Any
    """What it returned."""

    @property
    def flops(self) -> int:
        """By the formula; 0 without one."""
        formula = flop_registry.get(self.operator)
        return 0 if formula is None else int(formula(*self.args, **self.kwargs, out_val=self.result))


RUN_RANDOM_OPERATORS = {
    "run_and_save_rng_state": 0,
    "run_with_rng_state": 1,
    "graphsafe_run_with_rng_state": 0,
}
"""Operators that run another one, which draws random numbers; its position among their arguments. Recomputed
attention is run by them, whether or not it drops anything."""
EFFECTS = "with_effects"
"""An operator that runs another one in order. It takes a token and that operator, and returns a token and the
results."""


def _unwrapped(call: Call) -> Call:
    """The call of the operator that an operator runs, if it is one that runs another."""
    name = call.operator.name() if isinstance(call.operator, HigherOrderOperator) else None
    result = call.result
    if name == EFFECTS:
        position = 1
        result = result[1] if isinstance(result, (tuple, list)) and len(result) == 2 else result
    elif name in RUN_RANDOM_OPERATORS:
        position = RUN_RANDOM_OPERATORS[name]
        result = result[1] if name == "run_and_save_rng_state" and result is not None else result
    else:
        return call
    kwargs = {key: value for key, value in call.kwargs.items() if key != "rng_state"}
    return Call(call.args[position].overloadpacket, call.args[position + 1 :], kwargs, result)


class _CountingCompiledCode(CountingMode):
    """Counts inside compiled code; torch's own mode has `torch.compile` step aside."""

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
        if isinstance(func, HigherOrderOperator):
            return self._run_higher_order(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def _run_higher_order(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that runs others, and count them, which torch's mode does for few."""
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
    """Count FLOPs as `FlopCounterMode` does, compiled regions included.

    Read `counter.get_total_flops()` afterwards.

    Inside torch's own context manager `torch.compile` runs the model eagerly, so that it counts another
    program than the one in use. What is only traced while a step compiles does not run and is not counted.
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
"""Names of operators whose work must not be taken for zero: products, factorisations, transforms."""
NOT_MATMUL = re.compile(r"_(pad|logical|shape)|reorder|prepack|flatten|lu_unpack|slice_inverse|vector_norm")
"""Names that look like it and only arrange or check their arguments."""


def node_flops(node: fx.Node) -> int:
    """FLOPs of running this node once at the shapes it was captured with.

    Raises:
        CaptureError: for a matmul-like operator without a formula.
    """
    if _formula_of(node) is not None:
        return _call_of(node).flops
    if is_unknown(node):
        refuse_unknown([node])
    return max((sum(map(node_flops, _calls_in(graph))) for graph in _subgraphs(node)), default=0)


def planning_flops(node: fx.Node) -> int:
    """FLOPs to compare ways of running a graph; an operator without a formula costs one per element it makes.

    Never to be reported: training an operator needs no formula, a cost does.
    """
    if not is_unknown(node):
        return node_flops(node)
    made = _concrete(node.meta["val"])
    results = made if isinstance(made, (tuple, list)) else [made]
    return max(1, sum(result.numel() for result in results if isinstance(result, torch.Tensor)))


def has_flops(node: fx.Node) -> bool:
    """Whether running this node takes FLOPs, known or not."""
    return node.op == "call_function" and (is_unknown(node) or node_flops(node) > 0)


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
    """FLOPs that each output of a masked backward operator takes by itself; empty for other nodes.

    A convolution's backward computes the gradients of input, weight and bias independently, as its mask says.
    """
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


def is_unknown(node: fx.Node) -> bool:
    """Whether a node does matmul-like work that no formula counts."""
    if node.op != "call_function" or _formula_of(node) is not None:
        return False
    subgraphs = _subgraphs(node)
    if not subgraphs:
        return _does_matmul_like_work(node)
    is_refused = is_unknown if node.target in RUNS_ONE_SUBGRAPH else has_flops
    return any(is_refused(call) for graph in subgraphs for call in _calls_in(graph))


def refuse_unknown(nodes: Iterable[fx.Node]) -> None:
    """Refuse the nodes whose FLOPs nobody knows, all of them at once.

    Raises:
        CaptureError: naming every such operator, and how to register its formula.
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
"""Operators that run one of their subgraphs once, and count as the costliest, as in torch's counter. Others
run theirs, such as the body of a loop, a number of times that is not known before."""


def _subgraphs(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator is given."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    owner, names = node.graph.owning_module, [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    values = [getattr(owner, str(name), None) for name in names]
    return [value.graph for value in values if isinstance(value, fx.GraphModule)]


def _calls_in(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _formula_of(node: fx.Node) -> Callable[..., int] | None:
    """The formula that counts a node, if there is one."""
    formula: Callable[..., int] | None = flop_registry.get(_key_of(node.target))
    if formula is None and isinstance(node.target, HigherOrderOperator):
        formula = flop_registry.get(_key_of(_operator_run_by(node)))
    return formula


def _key_of(target: object) -> object:
    """How torch's registry knows an operator: all overloads of one together."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _operator_run_by(node: fx.Node) -> OpOverload | None:
    """The operator among a node's arguments that the node runs."""
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
    """Whether an operator of this name multiplies matrices, or does comparable work."""
    return MATMUL_LIKE.search(name) is not None and NOT_MATMUL.search(name) is None


def _reads_two_matrices(node: fx.Node) -> bool:
    return sum(map(_is_float_matrix, node.all_input_nodes)) >= 2


def _is_float_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2


def _name_of(node: fx.Node) -> str:
    """`aten.mm`, `higher_order.cond`: what follows `torch.ops.`."""
    target = _operator_run_by(node) or node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket._qualified_op_name).replace("::", ".")
    return f"higher_order.{target.name()}" if isinstance(target, HigherOrderOperator) else str(target)


def _call_of(node: fx.Node) -> Call:
    """What a node calls: fake tensors for nodes, sizes as they were when captured."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))
    result = _concrete(node.meta.get("val"))
    return _unwrapped(Call(_key_of(node.target), _concrete(args), _concrete(kwargs), result))


def _concrete(value: Any) -> Any:
    """A nest of values with every symbolic size replaced by the size it was captured with.

    A formula that computes with symbolic sizes would make the compiled code hold for these sizes alone.
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
