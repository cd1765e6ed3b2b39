"""Activations that a model itself has ask for a gradient, as Wav2Vec2 does for checkpointing's sake.

The backward then runs down to them whatever is trained. So that a joint graph has that work, their gradients
are traced as that of one more parameter, a zero that is added to each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.torch_internals import tree_map

ZERO = "zero"
"""The name of that parameter, outside of the model's."""
SETTERS = (torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_)  # type: ignore[attr-defined]


def trace_what_asks(module: nn.Module) -> nn.Module:
    """Have a module's forward give activations that it has ask for a gradient one to be traced."""
    module.register_parameter(ZERO, nn.Parameter(torch.zeros(())))
    forward = module.forward

    def watched(**batch: Any) -> Any:
        with _Asking(getattr(module, ZERO)):
            return forward(**batch)

    module.forward = watched
    return module


def forget_zero(zero: fx.Node) -> None:
    """Take the added zero out of a joint graph that was traced with it; its gradient stays."""
    for sum_ in list(zero.users):
        sum_.replace_all_uses_with(sum_.args[0])  # type: ignore[arg-type]
        zero.graph.erase_node(sum_)
    zero.graph.erase_node(zero)


class _Asking(TorchFunctionMode):
    """Puts the sum with a zero in the place of every tensor that begins to ask for a gradient."""

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
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func in SETTERS and self._asks(*args, **kwargs):
            return self._begin(args[0])
        if func in SETTERS:
            self._sums.pop(args[0], None)
        elif self._sums:
            args, kwargs = tree_map(self._sum, (args, kwargs))
        return func(*args, **kwargs)

    def _asks(self, tensor: torch.Tensor, requires_grad: bool = True) -> bool:
        """Whether a tensor asks from now on, and did not by itself."""
        return requires_grad and (tensor in self._sums or not tensor.requires_grad)

    def _begin(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in self._sums:
            with torch.enable_grad():
                self._sums[tensor] = tensor + self._zero
        return tensor

    def _sum(self, argument: Any) -> Any:
        """The sum for an activation; a parameter that a forward makes asks as it is made, and is none."""
        is_activation = isinstance(argument, torch.Tensor) and not isinstance(argument, nn.Parameter)
        return self._sums.get(argument, argument) if is_activation else argument
