"""What a model takes and returns: its batch, its loss, its parameters, and the module inside wrappers."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import Parameter, ParameterStatus
from gtcompile.torch_internals import is_traceable_wrapper_subclass

RETURNED_DEPTH = 8
"""How deep tensors are looked for in what a model returns; a cache of caches of layers takes six."""


def loss_of(output: Any) -> torch.Tensor:
    """The scalar loss in what a model returned: itself, `.loss`, `["loss"]`, or the first of a tuple.

    Raises:
        CaptureError: when there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):  # where transformers' Trainer takes it
        loss = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = (
            f"a tensor of shape {list(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(output).__name__
        )
        raise CaptureError(
            f"expected the model to return its loss (a scalar, first in a tuple or as .loss), got {got}. "
            f"Does the batch contain labels?"
        )
    return loss.reshape(())


def tensors_of(output: Any, depth: int = RETURNED_DEPTH) -> list[torch.Tensor]:
    """Every tensor in what a model returned, in mappings, sequences and attributes of objects such as caches.

    Args:
        output: anything.
        depth: how deeply nested tensors are found, so that cycles end.
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
    """The user's own module inside the wrappers of `torch.compile` and `DistributedDataParallel`."""
    inner = without_replicas(getattr(without_replicas(model), "_orig_mod", without_replicas(model)))
    if not isinstance(inner, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return inner


def runs_as_one_region(model: nn.Module) -> bool:
    """Whether the model is compiled as a whole."""
    outermost = without_replicas(model)
    return unwrap(model) is not outermost or outermost._compiled_call_impl is not None


def without_replicas(model: nn.Module) -> nn.Module:
    """The module that `DistributedDataParallel` wraps, compiled or not; any other model itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def check_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse a batch that `model.forward` cannot take, before any work.

    Raises:
        TypeError: when the batch is not a mapping from argument names.
        ValueError: when the model takes no argument of some name, or needs one that is not there.
    """
    if not isinstance(batch, Mapping) or not all(isinstance(key, str) for key in batch):
        raise TypeError(
            f"expected one batch as the keyword dictionary of the model's forward, got {type(batch).__name__}"
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
    """Refuse tensors that are made of other tensors.

    Raises:
        CaptureError: naming the type of the first.
    """
    for value in values:
        if is_traceable_wrapper_subclass(value):
            raise CaptureError(
                f"expected plain tensors, got a {type(value).__name__} of shape {list(value.shape)}: a joint "
                f"graph sees the tensors that such a subclass is made of, not the one whose gradient is "
                f"asked for. Convert it to a plain tensor, or leave the modules that use it out of "
                f"compile_blocks(model, blocks=[...])."
            )


def list_parameters(model: nn.Module) -> tuple[Parameter, ...]:
    """Every parameter of the model in registration order, tied weights as one."""
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
