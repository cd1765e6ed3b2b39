"""What an optimizer keeps of each parameter: while the parameter is frozen, and in what is saved."""

from collections.abc import Callable, Collection
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gtcompile.capture.model_io import unwrap
from gtcompile.distributed.fsdp import sharded
from gtcompile.state.parameter_records import is_trained, was_trainable
from gtcompile.state.shadow_optimizer import ShadowOptimizer, innermost

Setting = Literal["keep", "cpu", "drop"]
"""What happens to the state of a frozen parameter: it stays as it is; it is moved to host memory and back,
bit for bit; or it is dropped and begins anew."""
HOST = torch.device("cpu")


class FrozenState:
    """Keeps, moves or drops the state of frozen parameters; learning rates and groups are never touched.

    State that is moved stays in `optimizer.state`, so checkpoints contain it. The optimizer does not read it,
    because the parameters have no gradient.

    Args:
        optimizer: any optimizer with a state for each parameter, or a wrapper with one in `.optimizer`.
        setting: "keep", "cpu" or "drop".

    Raises:
        ValueError: for another setting.
    """

    def __init__(self, optimizer: Optimizer, setting: Setting) -> None:
        check_setting(setting)
        self._optimizer, self._setting = innermost(optimizer), setting
        self._moved = WeakIdKeyDictionary()  # parameter -> whether its state was moved to the host

    def apply(self) -> None:
        """Bring the state in line with what is trained now. Call it whenever that has changed."""
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
        """Replace the tensors of a parameter's state; scalars (step counts) stay where they are."""
        state: dict[str, Any] = self._optimizer.state[parameter]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[name] = change(value)


def check_setting(setting: str) -> None:
    """Refuse an unknown setting.

    Raises:
        ValueError: names the known ones.
    """
    if setting not in get_args(Setting):
        raise ValueError(f'expected frozen_state "keep", "cpu" or "drop", got {setting!r}')


def state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Bytes of the tensors that an optimizer keeps for one parameter, without scalars."""
    state = innermost(optimizer).state.get(parameter, {})
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(map(_bytes, tensors))


def parameters_with_state(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """FQNs of the parameters that an optimizer has a state for."""
    named, state = unwrap(model).named_parameters(), innermost(optimizer).state
    return [fqn for fqn, parameter in named if sharded(parameter) in state]


def forget_state_of_others(model: nn.Module, optimizer: Optimizer, fqns: Collection[str]) -> None:
    """Drop the state of all parameters but these, such as what `complete_when_saved` made up for a file."""
    for fqn in set(parameters_with_state(model, optimizer)) - set(fqns):
        del innermost(optimizer).state[sharded(unwrap(model).get_parameter(fqn))]


def complete_when_saved(optimizer: Optimizer) -> RemovableHandle:
    """Have `optimizer.state_dict()` hold a state for every trainable parameter; its own state stays partial.

    torch's distributed checkpoints are read into an optimizer that has a state for every parameter. They fail
    on a parameter without, because it was never trained or its state was dropped. What is missing is made up:
    the state after a first step with a gradient of zero. `forget_state_of_others` drops it after loading.

    Returns:
        The handle of the hook; `.remove()` ends it.
    """
    return innermost(optimizer).register_state_dict_post_hook(_complete)


def _complete(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    shadow = ShadowOptimizer(optimizer)
    owned = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    made_up = {
        index: shadow.state_after(parameter, torch.zeros_like(parameter))
        for index, parameter in enumerate(owned)
        if index not in saved["state"] and was_trainable(parameter)
    }
    return {**saved, "state": {**saved["state"], **made_up}}


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
