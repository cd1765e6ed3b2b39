"""Register FLOP formulas in torch's own registry, so that `FlopCounterMode` uses them too."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from gtcompile.graph.flop_formulas import FORMULAS
from gtcompile.torch_internals import HigherOrderOperator, OpOverload, OpOverloadPacket, tree_map


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Register the FLOP formula of an operator, for gtcompile and for torch's `FlopCounterMode`.

    An operator with a separate backward operator needs one formula for each. An earlier formula is replaced.

    Args:
        operator: `torch.ops.library.name` or one of its overloads, the object that `torch.library.custom_op`
            returned, a higher-order operator, or the name `"library::name"`.
        formula: takes the operator's arguments, with a shape in place of each tensor, and returns the FLOPs
            of one call, 2 per multiply-add. If it has a parameter `out_shape`, it also receives the shapes of
            the operator's results.

    Raises:
        TypeError: `operator` is not an operator, or `formula` is not callable.
        ValueError: no operator has this name.

    Example:
        >>> import torch
        >>> register_flops(torch.ops.aten.kron, lambda left, right: 0)
    """
    if not callable(formula):
        raise TypeError(f"expected a function from shapes to FLOPs, got {formula!r}")
    flop_registry[_packet_of(operator)] = _given_shapes(formula)


def register_missing_formulas() -> None:
    """Register gtcompile's formulas for operators without one. Call it again after importing libraries."""
    for qualified_name, formula in FORMULAS.items():
        packet = _find_packet(qualified_name)
        if packet is not None and packet not in flop_registry:
            flop_registry[packet] = _given_shapes(formula)


def _packet_of(operator: Any) -> Any:
    if isinstance(operator, str):
        packet = _find_packet(operator)
        if packet is None:
            raise ValueError(f"no operator is called {operator!r}; expected 'library::name'. Is it imported?")
        return packet
    operator = getattr(operator, "_opoverload", operator)  # set by `torch.library.custom_op`
    if isinstance(operator, OpOverload):
        return operator.overloadpacket
    if isinstance(operator, (OpOverloadPacket, HigherOrderOperator)):
        return operator
    raise TypeError(f"expected an operator such as torch.ops.library.name, got {operator!r}")


def _find_packet(qualified_name: str) -> Any:
    namespace, _, name = qualified_name.partition("::")
    return getattr(getattr(torch.ops, namespace), name, None) if name else None


def _given_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """Adapt a formula to torch's registry, which passes tensors, and the operator's result as `out_val`."""
    parameters = inspect.signature(formula).parameters.values()
    takes_output = any(p.name == "out_shape" or p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(formula)
    def given_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs, out_shape = tree_map(_shape_of, (args, kwargs, out_val))
        return formula(*args, **kwargs, **({"out_shape": out_shape} if takes_output else {}))

    return given_tensors


def _shape_of(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


register_missing_formulas()
