"""One record per parameter: which code computes its gradient, and whether it is frozen.

These two determine `requires_grad` (see `requires_grad_of`). The flag of a parameter in a compiled region
never changes, so no Dynamo guard fails; the region calls `is_trained` instead.
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
    """Only eager code, as far as known."""
    EXPECTED = enum.auto()
    """Probably a compiled region, which has not run yet."""
    REGION = enum.auto()
    """A compiled region; eager code may use the parameter as well."""


@dataclass(slots=True)
class Record:
    """Mutable record of one parameter."""

    role: Role | None = None
    """None until a parameter is frozen for the first time or its model is compiled."""
    hook: RemovableHandle | None = None
    """Hook that drops gradients which eager code still computes; set only while the parameter is frozen."""
    requires_grad: bool = True
    """The flag as gtcompile last set it. If the parameter's flag differs, the user changed it."""
    ever_trained: bool = False
    """Whether it was trained at any time, see `ever_trained.py`."""

    @property
    def frozen(self) -> bool:
        """Whether `train_only` froze the parameter."""
        return self.hook is not None


_records = WeakIdKeyDictionary()  # nn.Parameter -> Record
_generations = itertools.count(1)
_generation = 0


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether this parameter is trained: it requires grad, and `train_only` did not freeze it."""
    return parameter.requires_grad and not is_frozen(sharded(parameter))


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter requires grad, or did before `train_only` froze it."""
    return parameter.requires_grad or is_frozen(sharded(parameter))


def generation() -> int:
    """Return a number that changes whenever `is_trained` may change. Use it as a cache key."""
    return _generation


def begin_generation() -> None:
    """Change `generation()`, because `is_trained` may have changed."""
    global _generation
    _generation = next(_generations)


def requires_grad_of(role: Role | None, *, frozen: bool) -> bool:
    """Return `requires_grad` for a trainable parameter.

    ========  =======  ======
    role      trained  frozen
    ========  =======  ======
    EAGER     True     False
    EXPECTED  True     True
    REGION    True     True
    ========  =======  ======

    Dynamo guards on the flag, so it must not change for parameters in a region, run or expected.
    """
    return not frozen or role is not Role.EAGER


def set_requires_grad(parameter: nn.Parameter, value: bool) -> None:
    """Set `requires_grad` and record the value, so that it does not count as set by the user."""
    if (record := _records.get(parameter)) is not None:
        record.requires_grad = value
    parameter.requires_grad_(value)


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether `train_only` froze this parameter. For FSDP, give the sharded parameter."""
    record: Record | None = _records.get(parameter)
    return record is not None and record.frozen


def is_recorded(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a record."""
    return parameter in _records


def record_of(parameter: nn.Parameter) -> Record:
    """Return the record of a parameter; create it if there is none."""
    found: Record | None = _records.get(parameter)
    if found is None:
        found = _records[parameter] = Record()
    return found


def freeze(parameter: nn.Parameter, default: Role) -> None:
    """Freeze a parameter and drop its gradient. `default` becomes its role if it has none."""
    record = record_of(parameter)
    parameter.grad = None
    record.role = record.role or default
    if record.hook is None:
        # autograd accepts this hook only on a tensor that requires grad; FSDP resets the flag of a whole
        # parameter from its shard at the next gathering
        differentiable = whole(parameter).requires_grad_()
        record.hook = differentiable.register_post_accumulate_grad_hook(_drop_stray_gradient)
    record.requires_grad = requires_grad_of(record.role, frozen=True)
    parameter.requires_grad_(record.requires_grad)


def thaw(parameter: nn.Parameter) -> None:
    """Undo `freeze`. A parameter that the user froze stays frozen."""
    record = record_of(parameter)
    if record.hook is not None:
        record.hook.remove()
        record.hook, record.requires_grad = None, True
        parameter.requires_grad_(True)


def is_set_by_hand(record: Record, parameter: nn.Parameter) -> bool:
    """Whether gtcompile froze a parameter with `requires_grad=False`, and the user set it to True again."""
    return record.frozen and not record.requires_grad and parameter.requires_grad


def expect_region(parameters: Iterable[nn.Parameter]) -> None:
    """Set the role EXPECTED: a region will probably compute these parameters' gradients.

    If Dynamo captures nothing of their block, so that eager code uses them, they become EAGER.
    """
    for parameter in map(sharded, parameters):
        set_role(parameter, Role.EXPECTED)


def leave_to_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Set the role EAGER for parameters that no region has used.

    Their flags stay until the next `train_only`, or until a frozen one receives a gradient: a forward and its
    recomputation by activation checkpointing must see the same flags.
    """
    for parameter in map(sharded, parameters):
        record = record_of(parameter)
        if record.role is not Role.REGION:
            record.role = Role.EAGER


def enter_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Clear the roles of parameters whose model is no longer compiled."""
    for parameter in map(sharded, parameters):
        record_of(parameter).role = None


def set_role(parameter: nn.Parameter, role: Role) -> None:
    """Set the role of a parameter, and the matching `requires_grad` if it is frozen."""
    record = record_of(parameter)
    record.role = role
    if record.frozen:
        set_requires_grad(parameter, requires_grad_of(role, frozen=True))


def _drop_stray_gradient(parameter: torch.Tensor) -> None:
    """Drop a gradient that eager code computed, and clear the flag so that autograd skips it next time."""
    if parameter.grad is None:
        return  # autograd calls this even if a compiled region returned no gradient
    assert isinstance(parameter, nn.Parameter)
    owner = sharded(parameter)
    record = record_of(owner)
    if is_set_by_hand(record, owner):
        return  # the user wants this gradient: the next `follow_names` thaws the parameter
    parameter.grad = None
    leave_to_eager([owner])
    set_requires_grad(owner, requires_grad_of(record.role, frozen=True))
