"""Show the quantized weights of bitsandbytes to tracers.

Such a weight is a parameter of integers, which cannot be trained; its scales are attributes of the parameter.
Tracers replace each parameter of a module by a tensor of their own, which has no such attributes, and refuse
tensors that are neither parameters nor buffers.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gtcompile.torch_internals import FakeTensor

LIBRARY = "bitsandbytes"


def expose_quantized(model: nn.Module) -> None:
    """Turn quantized weights and their scales into buffers, and bind them to each other before each forward.

    Args:
        model: changed in place: parameters, buffers, forward pre-hooks and attributes of modules.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and _is_quantized(parameter):
                _expose(module, name, parameter)


def _is_quantized(parameter: nn.Parameter) -> bool:
    differentiable = parameter.is_floating_point() or parameter.is_complex()
    return not differentiable and type(parameter) not in (nn.Parameter, FakeTensor)


def _expose(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    own = {key: value for key, value in vars(module).items() if _is_of_library(value)}
    attributes = {key: value for key, value in vars(parameter).items() if value is not module}
    buffers: dict[int, str] = {}

    def register(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in buffers:
            buffers[id(tensor)] = f"{name}_quantized_{len(buffers)}"
            module.register_buffer(buffers[id(tensor)], tensor.detach().as_subclass(torch.Tensor))
        return tensor

    def bind(module: nn.Module, _inputs: object) -> None:
        def current(tensor: torch.Tensor) -> torch.Tensor:
            return module.get_buffer(buffers[id(tensor)])

        weight = current(parameter)
        vars(weight).update(_map_tensors(current, attributes))
        vars(module).update(_map_tensors(current, own), **{name: weight})

    del module._parameters[name]
    _map_tensors(register, [parameter, own, attributes])
    module.register_forward_pre_hook(bind)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Copy nested containers and objects of the library, with a function applied to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_tensors(function, part) for part in value]
    if not _is_of_library(value):
        return value
    twin = copy.copy(value)
    vars(twin).update(_map_tensors(function, vars(value)))
    return twin


def _is_of_library(value: object) -> bool:
    """Whether a value is an object, not a module, of a class that bitsandbytes defines."""
    defined = type(value).__module__.partition(".")[0] == LIBRARY
    return defined and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor))
