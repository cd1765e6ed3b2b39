"""A model as its author wrote it: neither compiled nor sharded, and on no meta device."""

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import runs_as_one_region
from gtcompile.distributed import fsdp
from gtcompile.torch_internals import EMBEDDING_HOOK, FakeTensorMode

_COLLECTIONS = (dict, OrderedDict, defaultdict, list, set, deque)
"""Attributes of these very types are put back with what was in them; others keep what they hold."""


@contextlib.contextmanager
def as_written(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """The model as its author wrote it, neither compiled nor sharded, and itself again afterwards."""
    memo: dict[int, torch.Tensor] = {}
    fake, device = FakeTensorMode(allow_non_fake_inputs=True), _device_of(batch)

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
        yield


def without_forcing(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Forward hooks but those by which transformers and PEFT have embeddings' outputs ask for a gradient.

    Reentrant checkpointing needs them. Dynamo cannot trace them below frozen embeddings, and in what is
    compiled nothing runs for their sake.
    """
    return {key: hook for key, hook in hooks.items() if EMBEDDING_HOOK not in getattr(hook, "__name__", "")}


def _without_watching(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Forward pre-hooks but the one by which `train_only` watches for replaced parameters."""
    name = "notice_replaced_parameters"
    return {key: hook for key, hook in hooks.items() if getattr(hook, "__name__", "") != name}


@contextlib.contextmanager
def blocks_uncompiled(model: nn.Module) -> Iterator[None]:
    """The model as its author wrote it: forwards that `compile_blocks` replaced are back for a while."""
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
    """Let a block have the forward again that `compile_blocks` found: its class's, or one of the user's.

    Where somebody has put a wrapper around it since, the wrapper stays, around what runs eagerly.
    """
    compiled = compiled_forward(block)
    if vars(block)["forward"] is not compiled:
        compiled.retired = True
        return
    del block.forward
    if block.forward != compiled.eager:
        block.forward = compiled.eager


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward `compile_blocks` replaced."""
    return [module for module in model.modules() if compiled_forward(module) is not None]


def compiled_forward(module: nn.Module) -> Any:
    """The forward that `compile_blocks` gave a module, also behind what others put around it; None without.

    Accelerate wraps a model's forward for mixed precision, and `functools.wraps` says what it wraps.
    """
    found, forward = None, vars(module).get("forward")
    while forward is not None:
        if hasattr(forward, "retired"):
            found = forward  # the innermost: wrappers copy its attributes
        forward = getattr(forward, "__wrapped__", None)
    return None if found is None or found.retired else found


def uses_compiled_code(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or any module in it."""
    return runs_as_one_region(model) or any(map(is_compiled, model.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this very module runs compiled code."""
    return module._compiled_call_impl is not None or compiled_forward(module) is not None


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Modules and their classes have their own attributes back afterwards, and collections what was in them.

    A forward may write to them what is only traced, register hooks or put another module in a place, and a
    trace misplaces tensors of a module with two names.
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
    """Note by identity what is in each of the built-in collections, and in those in them."""
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


def off_meta(model: nn.Module, batch: Mapping[str, Any]) -> nn.Module:
    """The model itself, or for a model on the meta device its twin in fake tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return model
    device = _device_of(batch)
    twin = copy.deepcopy(model)
    memo: dict[int, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in twin.modules():
            for tensors_of in (module._parameters, module._buffers):
                for name, tensor in tensors_of.items():
                    if tensor is not None and tensor.is_meta:
                        tensors_of[name] = _fake_twin(tensor, device, memo)  # type: ignore[assignment]
    return twin


def _device_of(batch: Mapping[str, Any]) -> torch.device:
    devices = (value.device for value in batch.values() if isinstance(value, torch.Tensor))
    return next(devices, torch.device("cpu"))


def _fake_twin(tensor: torch.Tensor, device: torch.device, memo: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in memo:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return memo[id(tensor)]
