"""Optimizer state of frozen parameters, in memory and in checkpoints."""

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
from gtcompile.state.host_memory import to_host
from gtcompile.state.parameter_records import is_trained, was_trainable
from gtcompile.state.shadow_optimizer import ShadowOptimizer, innermost

Setting = Literal["keep", "cpu", "drop"]
"""Handling of a frozen parameter's optimizer state. "keep": unchanged. "cpu": moved to host memory while
frozen, bit for bit; from a GPU to pinned memory. "drop": deleted; training the parameter again starts
with new state."""


class FrozenState:
    """Keeps, moves or drops the optimizer state of frozen parameters; parameter groups stay unchanged.

    Moved state stays in `optimizer.state`, so checkpoints contain it. The optimizer does not read it, because
    frozen parameters have no gradient.

    Args:
        optimizer: any optimizer with state per parameter, or a wrapper with one in `.optimizer`.
        setting: "keep", "cpu" or "drop".

    Raises:
        ValueError: `setting` is unknown.
    """

    def __init__(self, optimizer: Optimizer, setting: Setting) -> None:
        check_setting(setting)
        self._optimizer, self._setting = innermost(optimizer), setting
        self._moved = WeakIdKeyDictionary()  # parameter -> whether its state was moved to the host

    @property
    def setting(self) -> Setting:
        """Where the state of frozen parameters goes."""
        return self._setting

    def apply(self) -> None:
        """Move or drop state according to the current trained set. Call it after every change of the set."""
        devices = {
            parameter.device for group in self._optimizer.param_groups for parameter in group["params"]
        }
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if is_trained(parameter):
                    self._fetch(parameter)
                elif self._setting == "drop":
                    self._optimizer.state.pop(parameter, None)
                elif self._setting == "cpu":
                    self._send(parameter)
        for device in (device for device in devices if device.type == "cuda"):
            torch.cuda.synchronize(device)  # the copies were only queued, and anyone may read them now

    def _send(self, parameter: nn.Parameter) -> None:
        if parameter in self._optimizer.state:
            self._replace(
                parameter, lambda value: to_host(value) if value.device == parameter.device else value
            )
            self._moved[parameter] = True

    def _fetch(self, parameter: nn.Parameter) -> None:
        if self._moved.pop(parameter, False) and parameter in self._optimizer.state:
            self._replace(parameter, lambda value: value.to(parameter.device, non_blocking=True))

    def _replace(self, parameter: nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the tensors of a parameter's state. Scalars (step counts) stay unchanged."""
        state: dict[str, Any] = self._optimizer.state[parameter]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[name] = change(value)


def check_setting(setting: str) -> None:
    """Refuse an unknown setting.

    Raises:
        ValueError: `setting` is unknown; the message lists the known ones.
    """
    if setting not in get_args(Setting):
        raise ValueError(f'expected frozen_state "keep", "cpu" or "drop", got {setting!r}')


def parameters_with_state(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the FQNs of the parameters that have optimizer state."""
    named, state = unwrap(model).named_parameters(), innermost(optimizer).state
    return [fqn for fqn, parameter in named if sharded(parameter) in state]


def forget_state_of_others(model: nn.Module, optimizer: Optimizer, fqns: Collection[str]) -> None:
    """Drop the state of all parameters but `fqns`: `complete_when_saved` adds artificial state to files."""
    for fqn in set(parameters_with_state(model, optimizer)) - set(fqns):
        del innermost(optimizer).state[sharded(unwrap(model).get_parameter(fqn))]


def complete_when_saved(optimizer: Optimizer) -> RemovableHandle:
    """Make `optimizer.state_dict()` return state for every trainable parameter.

    torch's distributed checkpoints are loaded into an optimizer with state for every parameter, and fail if a
    parameter has none in the file (it was never trained, or its state was dropped). This hook fills the gaps
    with the state after a first step with a zero gradient. The optimizer's own state does not change.
    `forget_state_of_others` drops the artificial state after loading.

    Returns:
        The handle of the hook; `.remove()` removes it.
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
