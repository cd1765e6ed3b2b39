"""The memory of an optimizer's state."""

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.state.shadow_optimizer import innermost


def state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Bytes of the tensors that an optimizer keeps for one parameter, without scalars."""
    state = innermost(optimizer).state.get(parameter, {})
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(map(_bytes, tensors))


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
