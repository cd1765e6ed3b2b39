"""Fully sharded models (`fully_shard`, FSDP2): one parameter, two objects.

A rank keeps a shard of each parameter, a DTensor. The optimizer owns the shard, and gtcompile calls it the
parameter. While a module runs, a *whole* parameter takes its place: compiled regions see it, and autograd
gives it the gradient. torch sends the gradients that exist and skips the others, so a frozen parameter, which
has no gradient, is not sent. `link` records which whole parameter stands for which shard.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.weak import WeakIdKeyDictionary

_sharded_of = WeakIdKeyDictionary()  # whole parameter -> the sharded one it stands for
_whole_of = WeakIdKeyDictionary()  # sharded parameter -> weak reference to the whole one
_own = weakref.WeakKeyDictionary[FSDPModule, list[nn.Parameter]]()  # the parameters a module shards
_idle = weakref.WeakSet[FSDPModule]()  # modules without any parameter that requires grad
FSDP_HOOKS = "torch.distributed.fsdp"
"""Beginning of the module names of the hooks by which `fully_shard` gathers and reshards parameters."""


def sharded(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that the optimizer owns: for a whole parameter, the shard it stands for."""
    found: nn.Parameter = _sharded_of.get(parameter, parameter)
    return found


def whole(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that autograd gives a gradient: for a shard, the whole parameter that stands for it."""
    reference = _whole_of.get(parameter)
    found = None if reference is None else reference()
    return parameter if found is None else found


def shards(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules of a model that `fully_shard` was called on, which each shard some of its parameters."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def link(model: nn.Module) -> bool:
    """Put the shards back into the modules, and record which whole parameter stands for each shard.

    The first call for a model gathers one module after the other, so all ranks must make it. Later calls send
    nothing.

    Returns:
        Whether the model had parameters that were not recorded yet.
    """
    new = [module for module in shards(model) if module not in _own]
    for module in shards(model):
        module.reshard()
    for module in new:
        kept = _parameters(module)
        module.unshard()
        gathered = {slot: p for slot, p in _parameters(module).items() if p is not kept[slot]}
        _own[module] = [kept[slot] for slot in gathered]
        for slot, parameter in gathered.items():
            _sharded_of[parameter] = kept[slot]
            _whole_of[kept[slot]] = weakref.ref(parameter)
        module.reshard()
    return bool(new)


def is_linked(model: nn.Module) -> bool:
    """Whether `link` knows every sharded module of the model, and so what stands for its parameters."""
    return all(module in _own for module in shards(model))


def renew_reduction(model: nn.Module) -> None:
    """Make torch prepare the reduction of gradients in modules that had no gradient to reduce before.

    torch prepares it before a module's first forward, for the parameters that require grad then, and when a
    module is gathered by hand. All ranks call this after `requires_grad` of any parameter has changed.
    """
    for module in shards(model):
        reduces = any(parameter.requires_grad for parameter in _own[module])
        if reduces and module in _idle:
            module.unshard()
            module.reshard()
        (_idle.discard if reduces else _idle.add)(module)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that a model is sharded over; None for a model that is not sharded.

    Raises:
        ValueError: the processes are neither a one-dimensional mesh nor all processes.
    """
    # not the parameters of `shards(model)`: a module that computes the loss has them without being sharded
    parameters = map(sharded, model.parameters())
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    mesh = next(iter(meshes))
    if len(meshes) == 1 and mesh.ndim == 1:
        return mesh.get_group()
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD
    raise ValueError(
        f"expected a model sharded over a one-dimensional mesh, or over all processes; got meshes of "
        f"{', '.join(sorted(str(tuple(mesh.shape)) for mesh in meshes))} among {dist.get_world_size()}"
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: torch.Tensor) -> int:
    """The number of ranks that hold the same part of a tensor as this one."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if isinstance(placement, Replicate))


@contextlib.contextmanager
def as_written(model: nn.Module, twin: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, give a sharded model the classes and hooks that its author wrote.

    Args:
        model: sharded or not.
        twin: returns a tensor of the whole shape to put in a sharded parameter's place.
    """
    with contextlib.ExitStack() as stack:
        for module in list(shards(model)):
            assert isinstance(module, nn.Module)
            module.reshard()
            stack.enter_context(_own_class(module))
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                stack.enter_context(changed(hooks, _without_gathering))
        for part in model.modules():
            stack.enter_context(changed(part._parameters, lambda own: _whole_twins(own, twin)))
        yield


def _whole_twins(parameters: dict[str, Any], twin: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {name: twin(p) if isinstance(p, DTensor) else p for name, p in parameters.items()}


def _parameters(module: FSDPModule) -> dict[tuple[nn.Module, str], nn.Parameter]:
    """The parameters in a module now, by the module and the name they are registered under."""
    assert isinstance(module, nn.Module)
    return {
        (part, name): parameter
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    }


@contextlib.contextmanager
def _own_class(module: nn.Module) -> Iterator[None]:
    """Within the block, make a sharded module an instance of the class that it had before."""
    sharded_class = type(module)
    try:
        module.__class__ = class_before_sharding(sharded_class)
        yield
    finally:
        module.__class__ = sharded_class


def class_before_sharding(sharded_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before `fully_shard`, which derives a class from `FSDPModule` and that class."""
    own: type[nn.Module] = next(base for base in sharded_class.__bases__ if base is not FSDPModule)
    return own


@contextlib.contextmanager
def changed(
    entries: MutableMapping[Any, Any], change: Callable[[dict[Any, Any]], dict[Any, Any]]
) -> Iterator[None]:
    """Within the block, replace the entries of a dictionary by what `change` returns for them."""
    kept = dict(entries)
    try:
        entries.clear()
        entries.update(change(kept))
        yield
    finally:
        entries.clear()
        entries.update(kept)


def _without_gathering(hooks: dict[Any, Any]) -> dict[Any, Any]:
    return {key: hook for key, hook in hooks.items() if not hook.__module__.startswith(FSDP_HOOKS)}
