"""A model as its author wrote it: neither compiled nor sharded, and on no meta device."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gtcompile import fully_sharded
from gtcompile.torch_internals import FakeTensorMode


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
            stack.enter_context(fully_sharded.changed(module._forward_hooks, without_forcing))
        stack.enter_context(fully_sharded.as_written(model, twin))
        stack.enter_context(blocks_uncompiled(model))
        stack.enter_context(attributes_kept(model))
        yield


def without_forcing(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Forward hooks but those by which transformers and PEFT have embeddings' outputs ask for a gradient.

    Reentrant checkpointing needs them. Dynamo cannot trace them below frozen embeddings, and in what is
    compiled nothing runs for their sake.
    """
    name = "make_inputs_require_grad"  # with an s in transformers
    return {key: hook for key, hook in hooks.items() if name not in getattr(hook, "__name__", "")}


@contextlib.contextmanager
def blocks_uncompiled(model: nn.Module) -> Iterator[None]:
    """The model as its author wrote it: forwards that `compile_blocks` replaced are back for a while."""
    compiled = {block: vars(block)["forward"] for block in compiled_blocks(model)}
    for module in compiled:
        uncompile_block(module)
    try:
        yield
    finally:
        for module, forward in compiled.items():
            module.forward = forward


def uncompile_block(block: nn.Module) -> None:
    """Let a block have the forward again that `compile_blocks` found: its class's, or one of the user's."""
    eager = vars(block)["forward"].eager
    del block.forward
    if block.forward != eager:
        block.forward = eager


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward `compile_blocks` replaced."""
    return [module for module in model.modules() if hasattr(vars(module).get("forward"), "compiled")]


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Modules have their own attributes back afterwards.

    A forward may write to them what is only traced, and a trace misplaces tensors of a module with two names.
    """
    kept = []
    for module in model.modules():
        kept += [(own, dict(own)) for own in (vars(module), module._parameters, module._buffers)]
    try:
        yield
    finally:
        for own, attributes in kept:
            own.clear()
            own.update(attributes)


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
