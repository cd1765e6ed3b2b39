"""Models sharded with `fully_shard` (FSDP2), in which each parameter has two objects.

The *sharded* parameter is a DTensor with this rank's shard; the optimizer owns it. While a module runs, FSDP
replaces it by the *whole* parameter: compiled regions read it, and autograd computes its gradient. FSDP
reduces only gradients that exist, so nothing is sent for a frozen parameter. `link` records which whole
parameter belongs to which sharded one. gtcompile keeps its records for the sharded parameter.
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

_sharded_of = WeakIdKeyDictionary()  # whole parameter -> its sharded parameter
_whole_of = WeakIdKeyDictionary()  # sharded parameter -> weak reference to its whole parameter
_own = weakref.WeakKeyDictionary[FSDPModule, list[nn.Parameter]]()  # module -> the parameters that it shards
_idle = weakref.WeakSet[FSDPModule]()  # sharded modules in which no parameter requires grad
FSDP_HOOKS = "torch.distributed.fsdp"
"""Prefix of the Python module that defines the hooks of `fully_shard`."""


def sharded(parameter: nn.Parameter) -> nn.Parameter:
    """Return the sharded parameter of a whole one; any other parameter unchanged."""
    found: nn.Parameter = _sharded_of.get(parameter, parameter)
    return found


def whole(parameter: nn.Parameter) -> nn.Parameter:
    """Return the whole parameter of a sharded one; any other parameter unchanged."""
    reference = _whole_of.get(parameter)
    found = None if reference is None else reference()
    return parameter if found is None else found


def shards(model: nn.Module) -> Iterator[FSDPModule]:
    """Return the modules of a model that `fully_shard` was called on."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def link(model: nn.Module) -> bool:
    """Reshard all modules, and record which whole parameter belongs to each sharded one.

    The first call for a model gathers one module after the other, so all ranks must make it. Later calls do
    not communicate.

    Returns:
        Whether new sharded modules were found.
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
    """Whether `link` has recorded every sharded module of the model."""
    return all(module in _own for module in shards(model))


def renew_reduction(model: nn.Module) -> None:
    """Make FSDP prepare gradient reduction in modules where no parameter required grad before.

    FSDP prepares it before a module's first forward, for the parameters that require grad at that time, and
    in an explicit `unshard()`. All ranks must call this after `requires_grad` of any parameter has changed.
    """
    for module in shards(model):
        reduces = any(parameter.requires_grad for parameter in _own[module])
        if reduces and module in _idle:
            module.unshard()
            module.reshard()
        (_idle.discard if reduces else _idle.add)(module)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the processes that a model is sharded over; None if it is not sharded.

    Raises:
        ValueError: the mesh is not one-dimensional and does not contain all processes.
    """
    # not the parameters of `shards(model)`: a loss module may hold sharded parameters without being sharded
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
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is distributed as another one is, of which this rank holds `value`."""
    if not isinstance(tensor, DTensor):
        return value
    layout: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    distributed: torch.Tensor = DTensor.from_local(value, tensor.device_mesh, tensor.placements, **layout)
    return distributed


def copies(tensor: torch.Tensor) -> int:
    """Return the number of ranks that hold the same part of a tensor, this one included."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if isinstance(placement, Replicate))


@contextlib.contextmanager
def as_written(model: nn.Module, twin: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, give a sharded model the classes and hooks that its author wrote.

    Args:
        model: sharded or not.
        twin: from a sharded parameter to the tensor of whole shape that replaces it.
    """

    def whole_twins(parameters: dict[str, Any]) -> dict[str, Any]:
        return {name: twin(p) if isinstance(p, DTensor) else p for name, p in parameters.items()}

    with contextlib.ExitStack() as stack:
        for module in list(shards(model)):
            assert isinstance(module, nn.Module)
            module.reshard()
            stack.enter_context(_own_class(module))
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                stack.enter_context(changed(hooks, _without_gathering))
        for part in model.modules():
            stack.enter_context(changed(part._parameters, whole_twins))
        yield


def _parameters(module: FSDPModule) -> dict[tuple[nn.Module, str], nn.Parameter]:
    """Return the current parameters in a module, by owning module and name."""
    assert isinstance(module, nn.Module)
    return {
        (part, name): parameter
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    }


@contextlib.contextmanager
def _own_class(module: nn.Module) -> Iterator[None]:
    """Within the block, give a sharded module its class from before `fully_shard`."""
    sharded_class = type(module)  # derived from `FSDPModule` and the class before
    try:
        module.__class__ = next(base for base in sharded_class.__bases__ if base is not FSDPModule)
        yield
    finally:
        module.__class__ = sharded_class


@contextlib.contextmanager
def changed(
    entries: MutableMapping[Any, Any], change: Callable[[dict[Any, Any]], dict[Any, Any]]
) -> Iterator[None]:
    """Within the block, replace the entries of a dictionary by the result of `change`."""
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
