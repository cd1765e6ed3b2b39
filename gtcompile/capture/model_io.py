"""Check batches, find the loss in a model's output, list its parameters, and unwrap it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import Parameter, ParameterStatus
from gtcompile.torch_internals import is_traceable_wrapper_subclass

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""A loss outside of the model: takes the model and a batch of any structure, returns a scalar tensor."""

RETURNED_DEPTH = 8
"""Levels of nested containers to search for tensors; an encoder-decoder's key-value cache has six."""


def loss_of(output: Any) -> torch.Tensor:
    """Find the scalar loss in what a model returned.

    It is the output itself, `.loss`, `["loss"]`, the first element of a tuple (as for transformers' Trainer),
    or the only scalar in a tuple.

    Returns:
        The loss, with shape [].

    Raises:
        CaptureError: the output contains no scalar loss.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        loss = _loss_in_tuple(output)
    elif not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
    if not _is_scalar(loss):
        raise CaptureError(
            f"expected the model to return its loss (a scalar, as .loss, first in a tuple or the only scalar "
            f"in it), got {_said(output, loss)}. Does the batch contain labels? "
            f"If the loss is computed outside of the model, pass loss_fn=..."
        )
    return scalar_loss(loss)


def scalar_loss(value: Any) -> torch.Tensor:
    """Check the result of a loss function, and reshape it to [].

    Raises:
        CaptureError: the value is not a tensor with one element.
    """
    if not _is_scalar(value):
        raise CaptureError(f"expected loss_fn to return a scalar tensor, got {_said(value, value)}")
    loss: torch.Tensor = value.reshape(())
    return loss


def _loss_in_tuple(output: tuple[Any, ...]) -> Any:
    """Return the first element if it is a scalar, else the only scalar, else the first element."""
    scalars = [element for element in output if _is_scalar(element)]
    first = output[0] if output else None
    return first if _is_scalar(first) or len(scalars) != 1 else scalars[0]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _said(output: Any, loss: Any) -> str:
    if isinstance(loss, torch.Tensor):
        return f"a tensor of shape {list(loss.shape)}"
    return type(output).__name__


def tensors_of(output: Any, depth: int = RETURNED_DEPTH) -> list[torch.Tensor]:
    """Return every tensor in mappings, sequences and attributes of objects such as caches.

    Args:
        output: any value, such as the output of a model.
        depth: levels of nested containers to search; finite, because containers may be cyclic.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    parts: list[Any] = []
    if depth and isinstance(output, Mapping):
        parts = list(output.values())
    elif depth and isinstance(output, (list, tuple)):
        parts = list(output)
    elif depth and hasattr(output, "__dict__") and not isinstance(output, (nn.Module, type)):
        parts = list(vars(output).values())
    return [tensor for part in parts for tensor in tensors_of(part, depth - 1)]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside the wrappers of `torch.compile` and `DistributedDataParallel`.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    inner = without_replicas(getattr(without_replicas(model), "_orig_mod", without_replicas(model)))
    if not isinstance(inner, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return inner


def runs_as_one_region(model: nn.Module) -> bool:
    """Whether `torch.compile` or `model.compile()` compiles the model as a whole."""
    outermost = without_replicas(model)
    return unwrap(model) is not outermost or outermost._compiled_call_impl is not None


def without_replicas(model: nn.Module) -> nn.Module:
    """Return the module that `DistributedDataParallel` wraps, compiled or not; any other model itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def check_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse a batch that `model.forward` cannot take, before any work.

    Raises:
        TypeError: the batch is not a mapping from argument names.
        ValueError: the model takes no argument of some name, or requires one that is missing.
    """
    if not isinstance(batch, Mapping) or not all(isinstance(key, str) for key in batch):
        raise TypeError(
            f"expected one batch as the keyword dictionary of the model's forward, "
            f"got {type(batch).__name__}. For a batch of another kind pass loss_fn=..., "
            f"a function of the model and the batch."
        )
    signature = inspect.signature(model.forward).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in signature.values())
    unknown = [key for key in batch if key not in signature and not takes_any]
    if unknown:
        raise ValueError(
            f"{type(model).__name__}.forward takes no {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(signature)}. Remove the extra keys from the batch."
        )
    missing = [name for name, p in signature.items() if _is_required(p) and name not in batch]
    if missing:
        raise ValueError(
            f"{type(model).__name__}.forward needs {', '.join(missing)}, which the batch lacks; "
            f"it has {', '.join(batch) or 'nothing'}. Add what is missing to the batch."
        )


def _is_required(argument: inspect.Parameter) -> bool:
    by_name = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    return by_name and argument.default is argument.empty


def refuse_subclasses(values: Iterable[object]) -> None:
    """Refuse tensor subclasses that wrap other tensors.

    Raises:
        CaptureError: names the type of the first.
    """
    for value in values:
        if is_traceable_wrapper_subclass(value):
            raise CaptureError(
                f"expected plain tensors, got a {type(value).__name__} of shape {list(value.shape)}: a joint "
                f"graph contains only the tensors inside such a subclass, so the subclass has no gradient. "
                f"Convert it to a plain tensor, or leave the modules that use it out of "
                f"compile_blocks(model, blocks=[...])."
            )


COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
"""Sparse layouts that torch's tracing does not support; it ends the process at a trainable one."""


def refuse_compressed_sparse(tensors: Iterable[torch.Tensor]) -> None:
    """Refuse tensors in a compressed sparse layout.

    Raises:
        CaptureError: names the layout of the first.
    """
    for tensor in tensors:
        if tensor.layout in COMPRESSED:
            raise CaptureError(
                f"expected dense tensors, got one of shape {list(tensor.shape)} in the layout "
                f"{tensor.layout}: torch cannot trace this layout, so there is no joint graph. Training "
                f"works: modules with such tensors run eagerly. For costs, convert it with .to_dense()."
            )


def list_parameters(model: nn.Module) -> tuple[Parameter, ...]:
    """List the parameters of a model in registration order. Tied weights are one parameter."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
        tensors[id(parameter)] = parameter
    return tuple(_describe(tensors[key], fqns) for key, fqns in names.items())


def _describe(parameter: nn.Parameter, fqns: list[str]) -> Parameter:
    status: ParameterStatus = "selectable" if parameter.requires_grad else "frozen by user"
    shape = tuple(parameter.shape)
    return Parameter(fqn=fqns[0], aliases=tuple(fqns[1:]), shape=shape, dtype=parameter.dtype, status=status)
