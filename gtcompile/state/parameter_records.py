"""One record per parameter: which code computes its gradient, and whether it is frozen.

`requires_grad` follows from the two (`requires_grad_of`). A compiled region never sees a flag change, so no
Dynamo guard fails; it asks `is_trained` instead.
"""

import enum
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gtcompile.distributed.fsdp import sharded, whole


class Role(enum.Enum):
    """Which code computes a parameter's gradient."""

    EAGER = enum.auto()
    """Eager code alone, as far as seen."""
    EXPECTED = enum.auto()
    """A compiled region, presumably: it has not run yet."""
    REGION = enum.auto()
    """A compiled region; eager code may use the parameter as well."""


@dataclass(slots=True)
class Record:
    """What is known of one parameter."""

    role: Role | None = None
    """None until a parameter is frozen for the first time or its model is compiled."""
    hook: RemovableHandle | None = None
    """Drops gradients that eager code computes all the same; there exactly while the parameter is frozen."""
    requires_grad: bool = True
    """The flag as gtcompile last set it: where the parameter has another, somebody else set it."""

    @property
    def frozen(self) -> bool:
        """Whether `train_only` froze the parameter."""
        return self.hook is not None


_records = WeakIdKeyDictionary()  # nn.Parameter -> Record
_generations = itertools.count(1)
_generation = 0


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether a gradient is wanted for this parameter."""
    return parameter.requires_grad and not is_frozen(sharded(parameter))


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter requires grad, or did until `train_only` froze it."""
    return parameter.requires_grad or is_frozen(sharded(parameter))


def generation() -> int:
    """A number that changes whenever `is_trained` may change. Use it as a cache key."""
    return _generation


def begin_generation() -> None:
    """Say that `is_trained` may have changed."""
    global _generation
    _generation = next(_generations)


def requires_grad_of(role: Role | None, *, frozen: bool) -> bool:
    """The flag of a parameter that is trainable at all.

    ========  =======  ======
    role      trained  frozen
    ========  =======  ======
    EAGER     True     False
    EXPECTED  True     True
    REGION    True     True
    ========  =======  ======

    Dynamo guards on the flag, so it must not change for what a region computes, or will compute.
    """
    return not frozen or role is not Role.EAGER


def set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    """Set the flag for gtcompile's own purposes: it does not count as set by hand."""
    if (record := _records.get(parameter)) is not None:
        record.requires_grad = value
    parameter.requires_grad_(value)


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether `train_only` froze this parameter: of a sharded model, the sharded one."""
    record: Record | None = _records.get(parameter)
    return record is not None and record.frozen


def is_recorded(parameter: nn.Parameter) -> bool:
    """Whether anything is known of a parameter."""
    return parameter in _records


def record_of(parameter: nn.Parameter) -> Record:
    """The record of a parameter, which begins here if there is none."""
    found: Record | None = _records.get(parameter)
    if found is None:
        found = _records[parameter] = Record()
    return found


def freeze(parameter: nn.Parameter, default: Role) -> None:
    """Freeze a parameter; `default` is its role if none is known."""
    record = record_of(parameter)
    parameter.grad = None
    record.role = record.role or default
    if record.hook is None:
        # autograd takes hooks only where a gradient is required; a whole parameter of FSDP's follows the flag
        # of its sharded one when it is next gathered
        differentiable = whole(parameter).requires_grad_()
        record.hook = differentiable.register_post_accumulate_grad_hook(_drop_stray_gradient)
    record.requires_grad = requires_grad_of(record.role, frozen=True)
    parameter.requires_grad_(record.requires_grad)


def thaw(parameter: nn.Parameter) -> None:
    """Undo `freeze`. A parameter that the user froze stays as it is."""
    record = record_of(parameter)
    if record.hook is not None:
        record.hook.remove()
        record.hook, record.requires_grad = None, True
        parameter.requires_grad_(True)


def is_set_by_hand(record: Record, parameter: nn.Parameter) -> bool:
    """Whether somebody had a parameter require grad that gtcompile froze by `requires_grad=False`."""
    return record.frozen and not record.requires_grad and parameter.requires_grad


def expect_region(parameters: Iterable[nn.Parameter]) -> None:
    """Note that a region may compute these parameters' gradients.

    If eager code turns out to use them, because Dynamo captures nothing of their block, they become EAGER.
    """
    for parameter in map(sharded, parameters):
        set_role(parameter, Role.EXPECTED)


def leave_to_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Note that eager code alone uses these parameters, unless a region was seen to use them.

    Their flags stay until `train_only` is called, or until a gradient comes for a frozen one: a forward and
    its recomputation by activation checkpointing must see the same flags.
    """
    for parameter in map(sharded, parameters):
        record = record_of(parameter)
        if record.role is not Role.REGION:
            record.role = Role.EAGER


def enter_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Forget the roles of parameters whose model is not compiled any more."""
    for parameter in map(sharded, parameters):
        record_of(parameter).role = None


def set_role(parameter: nn.Parameter, role: Role) -> None:
    """Give a parameter a role, and a frozen one the flag that goes with it."""
    record = record_of(parameter)
    record.role = role
    if record.frozen:
        set_requires_grad(parameter, requires_grad_of(role, frozen=True))


def _drop_stray_gradient(parameter: torch.Tensor) -> None:
    """Drop a gradient that eager code computed, and have autograd skip the parameter from now on."""
    assert isinstance(parameter, nn.Parameter)
    owner = sharded(parameter)
    record = record_of(owner)
    if is_set_by_hand(record, owner):
        return  # wanted: the next look at the model's names thaws it
    parameter.grad = None
    leave_to_eager([owner])
    set_requires_grad(owner, requires_grad_of(record.role, frozen=True))
