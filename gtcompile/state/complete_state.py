"""A state for every parameter in what an optimizer saves, as torch's distributed checkpoints expect.

Torch reads such a checkpoint into an optimizer whose every parameter was given a state, and fails on a
parameter that was never trained, or whose state was dropped. So a saved state is completed, and what was
invented for it is forgotten after it is loaded.
"""

from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gtcompile.capture.model_io import unwrap
from gtcompile.distributed.fsdp import sharded
from gtcompile.state.shadow_optimizer import ShadowOptimizer, innermost
from gtcompile.state.trained_set import was_trainable


def complete_when_saved(optimizer: Optimizer) -> RemovableHandle:
    """Have `optimizer.state_dict()` hold a state for every trainable parameter; its own state stays partial.

    What is missing is what a first step with a gradient of zero would leave.

    Returns:
        The handle of the hook; `.remove()` ends it.
    """
    return innermost(optimizer).register_state_dict_post_hook(_complete)


def parameters_with_state(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """FQNs of the parameters that an optimizer has a state for."""
    named, state = unwrap(model).named_parameters(), innermost(optimizer).state
    return [fqn for fqn, parameter in named if sharded(parameter) in state]


def forget_state_of_others(model: nn.Module, optimizer: Optimizer, fqns: Collection[str]) -> None:
    """Drop the state of parameters that are not among `fqns`."""
    for fqn in set(parameters_with_state(model, optimizer)) - set(fqns):
        del innermost(optimizer).state[sharded(unwrap(model).get_parameter(fqn))]


def _complete(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    shadow = ShadowOptimizer(optimizer)
    owned = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    invented = {
        index: shadow.state_after(parameter, torch.zeros_like(parameter))
        for index, parameter in enumerate(owned)
        if index not in saved["state"] and was_trainable(parameter)
    }
    return {**saved, "state": {**saved["state"], **invented}}
