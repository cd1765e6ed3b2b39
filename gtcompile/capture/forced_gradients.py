"""Activations on which the model calls `requires_grad_()`, as Wav2Vec2 does for gradient checkpointing.

The backward then computes their gradients for every trained set. To trace this work into the joint graph, a
scalar zero is added to each of these activations, as an additional parameter with a gradient of its own. The
pass `forget_added_zero` removes the additions from the graph again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.torch_internals import tree_map

ZERO = "zero"
"""Name of the additional parameter, in the module around the model."""
SETTERS = (torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_)  # type: ignore[attr-defined]


def trace_forced_gradients(module: nn.Module) -> nn.Module:
    """Register the parameter `ZERO`, and replace the forward by one that adds it to forced activations.

    Returns:
        The module, changed in place.
    """
    module.register_parameter(ZERO, nn.Parameter(torch.zeros(())))
    forward = module.forward

    def watched(**batch: Any) -> Any:
        with _ForcedGradients(getattr(module, ZERO)):
            return forward(**batch)

    module.forward = watched
    return module


class _ForcedGradients(TorchFunctionMode):
    """Replaces every tensor on which `requires_grad` is set by its sum with a zero."""

    def __init__(self, zero: torch.Tensor) -> None:
        super().__init__()
        self._zero = zero
        self._sums = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, with each forced activation replaced by its sum with the zero."""
        kwargs = kwargs or {}
        if func in SETTERS and self._begins(*args, **kwargs):
            return self._add_zero(args[0])
        if func in SETTERS:
            self._sums.pop(args[0], None)
        elif self._sums:
            args, kwargs = tree_map(self._sum, (args, kwargs))
        return func(*args, **kwargs)

    def _begins(self, tensor: torch.Tensor, requires_grad: bool = True) -> bool:
        """Whether this call forces a gradient: the flag was False before, or forced by an earlier call."""
        return requires_grad and (tensor in self._sums or not tensor.requires_grad)

    def _add_zero(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in self._sums:
            with torch.enable_grad():
                self._sums[tensor] = tensor + self._zero
        return tensor

    def _sum(self, argument: Any) -> Any:
        """Return the sum that replaces an activation. Parameters created in a forward are no activations."""
        is_activation = isinstance(argument, torch.Tensor) and not isinstance(argument, nn.Parameter)
        return self._sums.get(argument, argument) if is_activation else argument
