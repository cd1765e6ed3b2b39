"""Fully sharded models (`fully_shard`, FSDP2): one parameter, two objects.

Of each parameter a rank keeps a shard, a DTensor: that is what optimizers own, and what this project calls
the parameter. While a module runs, a *whole* parameter takes its place, which is what compiled regions see
and what autograd gives a gradient. Torch reduces and scatters the gradients that are there and leaves the
rest out, so a frozen parameter, which has none, is not sent. `link` notes which whole parameter stands for
which.
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
_idle = weakref.WeakSet[FSDPModule]()  # modules of which no parameter asked for a gradient
_HOOKS = "torch.distributed.fsdp"
"""Where the hooks come from that gather and reshard."""


def sharded(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that optimizers own: of a whole one, the sharded one it stands for."""
    found: nn.Parameter = _sharded_of.get(parameter, parameter)
    return found


def whole(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that autograd gives a gradient: of a sharded one, the whole one that stands for it."""
    reference = _whole_of.get(parameter)
    found = None if reference is None else reference()
    return parameter if found is None else found


def shards(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules of a model that are sharded, each with those of its parameters that no other shards."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def link(model: nn.Module) -> bool:
    """Let the modules have their sharded parameters, and note what stands for them while they run.

    The first call for a model gathers one module after the other, so all ranks must make it; later calls send
    nothing.

    Returns:
        Whether a parameter was not known before.
    """
    new = [module for module in shards(model) if module not in _own]
    for module in shards(model):
        module.reshard()
    for module in new:
        kept = _parameters(module)
        module.unshard()
        standing_in = {place: p for place, p in _parameters(module).items() if p is not kept[place]}
        _own[module] = [kept[place] for place in standing_in]
        for place, parameter in standing_in.items():
            _sharded_of[parameter] = kept[place]
            _whole_of[kept[place]] = weakref.ref(parameter)
        module.reshard()
    return bool(new)


def is_linked(model: nn.Module) -> bool:
    """Whether `link` knows every sharded module of the model, and so what stands for its parameters."""
    return all(module in _own for module in shards(model))


def renew_reduction(model: nn.Module) -> None:
    """Have torch work out anew how gradients are reduced of modules that had none to reduce before.

    It does so before a module's first forward from the parameters that ask for a gradient, and otherwise when
    a module is gathered by hand. All ranks call this after a change of what asks for a gradient.
    """
    for module in shards(model):
        asks = any(parameter.requires_grad for parameter in _own[module])
        if asks and module in _idle:
            module.unshard()
            module.reshard()
        (_idle.discard if asks else _idle.add)(module)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes among which a model is sharded; None when it is not.

    Raises:
        ValueError: when they are neither one row of a mesh nor all processes.
    """
    parameters = map(sharded, model.parameters())  # not of `shards`: a root's loss may be another module
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    mesh = next(iter(meshes))
    if len(meshes) == 1 and mesh.ndim == 1:
        return mesh.get_group()
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD
    raise ValueError(
        f"expected a model sharded over one row of processes, or over all of them; got meshes of "
        f"{', '.join(sorted(str(tuple(mesh.shape)) for mesh in meshes))} among {dist.get_world_size()}"
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: torch.Tensor) -> int:
    """How many ranks hold what this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if isinstance(placement, Replicate))


@contextlib.contextmanager
def as_written(model: nn.Module, twin: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A sharded model as its author wrote it, within the block: its own classes, nothing gathered.

    Args:
        model: sharded or not.
        twin: makes of each sharded parameter a whole one to put in its place.
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
    """The parameters in a module now, by where they are registered."""
    assert isinstance(module, nn.Module)
    return {
        (part, name): parameter
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    }


@contextlib.contextmanager
def _own_class(module: nn.Module) -> Iterator[None]:
    """An instance of the class it was made of, within the block."""
    kind = type(module)
    try:
        module.__class__ = kind.__bases__[1]  # of (FSDPModule, the class itself)
        yield
    finally:
        module.__class__ = kind


@contextlib.contextmanager
def changed(
    entries: MutableMapping[Any, Any], change: Callable[[dict[Any, Any]], dict[Any, Any]]
) -> Iterator[None]:
    """A dictionary with other entries within the block."""
    kept = dict(entries)
    try:
        entries.clear()
        entries.update(change(kept))
        yield
    finally:
        entries.clear()
        entries.update(kept)


def _without_gathering(hooks: dict[Any, Any]) -> dict[Any, Any]:
    return {key: hook for key, hook in hooks.items() if not hook.__module__.startswith(_HOOKS)}
