"""Which parameters were ever trained, although the trained set changes.

Every step of a `torch.optim.Optimizer` is watched: a parameter that has a gradient was trained.
So is a parameter with state in an optimizer that steps, which covers trainings that continue from a
checkpoint of the optimizer. Sets given to `train_only` by name count as well, because a loop may update
weights by hand. So the answer may name too many parameters, and never too few of those.
"""

import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gtcompile.capture.model_io import unwrap
from gtcompile.distributed.fsdp import sharded
from gtcompile.state.parameter_records import is_recorded, record_of
from gtcompile.state.replaced_parameters import follow_names

_stepped = weakref.WeakKeyDictionary[
    Optimizer, list[torch.Tensor]
]()  # what its latest step had gradients for


def ever_trained(model: nn.Module) -> frozenset[str]:
    """Return the FQNs of the parameters that were trained since gtcompile was first used in this process.

    Trainings that were continued with gtcompile's own state, or by an optimizer with state, count too.
    """
    follow_names(model)
    named = unwrap(model).named_parameters()
    return frozenset(fqn for fqn, parameter in named if _was_trained(sharded(parameter)))


def _was_trained(parameter: nn.Parameter) -> bool:
    return is_recorded(parameter) and record_of(parameter).ever_trained


def mark_trained(parameters: Iterable[torch.Tensor]) -> None:
    """Record that these parameters were trained."""
    for parameter in parameters:
        if isinstance(parameter, nn.Parameter):
            record_of(sharded(parameter)).ever_trained = True


def mark_names_trained(model: nn.Module, names: Iterable[str]) -> None:
    """Record that these parameters were trained, in another process or before. Other names are ignored."""
    names = frozenset(names)
    named = unwrap(model).named_parameters(remove_duplicate=False)
    mark_trained(parameter for name, parameter in named if name in names)


@torch.compiler.disable(reason="gtcompile records which parameters a step updates")  # type: ignore[untyped-decorator]
def _watch(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Step hook of every optimizer. When gradients exist for the same parameters as before, it only looks."""
    groups = optimizer.param_groups
    stepped = [p for group in groups for p in group["params"] if p.grad is not None]
    before = _stepped.get(optimizer)
    if before is None or len(before) != len(stepped) or not all(map(operator.is_, before, stepped)):
        mark_trained(stepped)
        mark_trained(parameter for parameter, state in optimizer.state.items() if state)
        _stepped[optimizer] = stepped


register_optimizer_step_pre_hook(_watch)
register_optimizer_step_post_hook(_watch)  # a closure may compute the gradients inside of the step
