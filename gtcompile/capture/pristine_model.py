"""Undo compiling, sharding and the meta device temporarily, to capture a model as its author wrote it."""

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import runs_as_one_region
from gtcompile.capture.quantized import expose_quantized
from gtcompile.distributed import fsdp
from gtcompile.torch_internals import EMBEDDING_HOOK, FakeTensorMode

_COLLECTIONS = (dict, OrderedDict, defaultdict, list, set, deque)
"""`attributes_kept` restores the items of attributes of exactly these types, and of no subclass."""


@contextlib.contextmanager
def as_written(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo compiling and sharding within the block, and turn quantized weights into buffers.

    Args:
        model: changed in place, and restored after the block.
        device: device of the fake tensors that replace sharded parameters.
    """
    memo: dict[int, torch.Tensor] = {}
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        with fake:
            return _fake_twin(tensor, device, memo)

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(fsdp.changed(module._forward_hooks, without_forcing))
            stack.enter_context(fsdp.changed(module._forward_pre_hooks, _without_watching))
        stack.enter_context(fsdp.as_written(model, twin))
        stack.enter_context(blocks_uncompiled(model))
        stack.enter_context(attributes_kept(model))
        expose_quantized(model)
        yield


def without_forcing(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Return all forward hooks except those that call `requires_grad_()` on the outputs of embeddings.

    transformers and PEFT add them for reentrant checkpointing. Dynamo cannot trace them above frozen
    embeddings, and compiled code runs no backward because of them.
    """
    return {key: hook for key, hook in hooks.items() if EMBEDDING_HOOK not in getattr(hook, "__name__", "")}


def _without_watching(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Return all forward pre-hooks except the one by which `train_only` watches for new parameters."""
    name = "notice_replaced_parameters"
    return {key: hook for key, hook in hooks.items() if getattr(hook, "__name__", "") != name}


@contextlib.contextmanager
def blocks_uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the block, restore the forwards that `compile_blocks` replaced."""
    outermost = {block: vars(block)["forward"] for block in compiled_blocks(model)}
    ours = [compiled_forward(block) for block in outermost]
    for module in outermost:
        uncompile_block(module)
    try:
        yield
    finally:
        for module, forward in outermost.items():
            module.forward = forward
        for compiled in ours:
            compiled.retired = False


def uncompile_block(block: nn.Module) -> None:
    """Restore the forward that a block had before `compile_blocks`: its class's, or one set by the user.

    A wrapper that was put around the compiled forward later stays, and calls the eager forward.
    """
    compiled = compiled_forward(block)
    if vars(block)["forward"] is not compiled:
        compiled.retired = True
        return
    del block.forward
    if block.forward != compiled.eager:
        block.forward = compiled.eager


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward `compile_blocks` replaced."""
    return [module for module in model.modules() if compiled_forward(module) is not None]


def compiled_forward(module: nn.Module) -> Any:
    """Return the forward that `compile_blocks` set on a module; None if there is none.

    It is also found inside wrappers: accelerate wraps forwards for mixed precision, with `functools.wraps`.
    """
    found, forward = None, vars(module).get("forward")
    while forward is not None:
        if hasattr(forward, "retired"):
            found = forward  # keep the innermost: `functools.wraps` copies attributes to the wrappers
        forward = getattr(forward, "__wrapped__", None)
    return None if found is None or found.retired else found


def uses_compiled_code(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or any module in it."""
    return runs_as_one_region(model) or any(map(is_compiled, model.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether this module itself is compiled, not only a submodule or a parent."""
    return module._compiled_call_impl is not None or compiled_forward(module) is not None


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules and their classes after the block, with the items of collections.

    A forward may store traced tensors on modules, register hooks or replace submodules while it is traced.
    The trace itself swaps the tensors of a module that is registered under two names.
    """
    modules = list(model.modules())
    classes = {kind for module in modules for kind in type(module).__mro__} - {*nn.Module.__mro__}
    kept: dict[int, tuple[Any, list[Any]]] = {}
    for owner in (*modules, *classes):
        _keep(vars(owner).values(), kept)
    own = [(vars(module), dict(vars(module))) for module in modules]
    of_classes = [(kind, dict(vars(kind))) for kind in classes]
    try:
        yield
    finally:
        for attributes, values in own:
            attributes.clear()
            attributes.update(values)
        for kind, values in of_classes:
            _restore_class(kind, values)
        for collection, items in kept.values():
            collection.clear()
            (collection.update if hasattr(collection, "update") else collection.extend)(items)


def _keep(values: Iterable[Any], kept: dict[int, tuple[Any, list[Any]]]) -> None:
    """Record the items of every built-in collection, and of the collections in it, by identity."""
    todo = list(values)
    while todo:
        found = todo.pop()
        if type(found) in _COLLECTIONS and id(found) not in kept:
            is_mapping = isinstance(found, dict)
            kept[id(found)] = found, list(found.items() if is_mapping else found)
            todo.extend(found.values() if is_mapping else found)


def _restore_class(kind: type, values: Mapping[str, Any]) -> None:
    for name in vars(kind).keys() - values.keys():
        delattr(kind, name)
    for name, value in values.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def off_meta(
    model: nn.Module, inputs: Mapping[str, Any], device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Replace tensors on the meta device by fake tensors on another device.

    Args:
        model: stays unchanged; a model with tensors on the meta device is copied.
        inputs: the tensors and other values of the batch, by name.
        device: device of the fake tensors.

    Returns:
        The model or its copy, and the inputs.
    """
    memo: dict[int, torch.Tensor] = {}
    twin = copy.deepcopy(model) if any(map(_is_meta, _tensors(model))) else model
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in twin.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        tensors[name] = _fake_twin(tensor, device, memo)  # type: ignore[assignment]
        return twin, {
            name: _fake_twin(value, device, memo) if _is_meta(value) else value
            for name, value in inputs.items()
        }


def device_of(model: nn.Module, inputs: Iterable[Any]) -> torch.device:
    """Return the device of the first tensor that is not on the meta device, batch first; else the CPU."""
    tensors = (value for value in (*inputs, *_tensors(model)) if isinstance(value, torch.Tensor))
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _fake_twin(tensor: torch.Tensor, device: torch.device, memo: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in memo:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return memo[id(tensor)]
