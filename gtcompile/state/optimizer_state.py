"""What becomes of the optimizer's state of a parameter while it is frozen."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from gtcompile.state.shadow_optimizer import innermost
from gtcompile.state.trained_set import is_trained

Setting = Literal["keep", "cpu", "drop"]
"""Left as it is; moved to host memory and back, bit for bit; or dropped, to be started anew."""
HOST = torch.device("cpu")


class FrozenState:
    """Keeps, moves or drops the state of frozen parameters; learning rates and groups are never touched.

    State that is moved stays in `optimizer.state`, so checkpoints contain it. An optimizer does not look at
    it, since the parameters have no gradient.

    Args:
        optimizer: any optimizer with its state by parameter, or a wrapper with one in `.optimizer`.
        setting: "keep", "cpu" or "drop".

    Raises:
        ValueError: for another setting.
    """

    def __init__(self, optimizer: Optimizer, setting: Setting) -> None:
        check_setting(setting)
        self._optimizer, self._setting = innermost(optimizer), setting
        self._moved = WeakIdKeyDictionary()  # parameter -> whether its state was moved to the host

    def apply(self) -> None:
        """Bring the state in line with what is trained now; to be called after every change of that."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if is_trained(parameter):
                    self._fetch(parameter)
                elif self._setting == "drop":
                    self._optimizer.state.pop(parameter, None)
                elif self._setting == "cpu":
                    self._send(parameter)

    def _send(self, parameter: nn.Parameter) -> None:
        if parameter in self._optimizer.state:
            self._replace(
                parameter, lambda value: value.to(HOST) if value.device == parameter.device else value
            )
            self._moved[parameter] = True

    def _fetch(self, parameter: nn.Parameter) -> None:
        if self._moved.pop(parameter, False) and parameter in self._optimizer.state:
            self._replace(parameter, lambda value: value.to(parameter.device))

    def _replace(self, parameter: nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the tensors of a state in place of the old; scalars (step counts) stay where they are."""
        state: dict[str, Any] = self._optimizer.state[parameter]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[name] = change(value)


def check_setting(setting: str) -> None:
    """Refuse what is no setting.

    Raises:
        ValueError: says what there is.
    """
    if setting not in get_args(Setting):
        raise ValueError(f'expected frozen_state "keep", "cpu" or "drop", got {setting!r}')


def state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Bytes of the tensors an optimizer keeps for one parameter, scalars left out."""
    state = innermost(optimizer).state.get(parameter, {})
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(map(_bytes, tensors))


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
