"""Which parameters are trained now.

Every parameter that gtcompile has to do with has one `Record`: which code computes its gradient (its role),
and whether it is frozen. `requires_grad` follows from the two (`requires_grad_of`). A compiled region never
sees a flag change, so no Dynamo guard fails; it asks `is_trained` instead.

Records belong to parameter objects, but people choose names. Loading with `assign=True`, resizing embeddings
or moving a model off the meta device puts new parameters under the old names. So `train_only` also keeps the
record of every name of the model, and `follow_names` hands it to the parameter that has the name now.
"""

import enum
import itertools
import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from gtcompile.capture.model_io import list_parameters, runs_as_one_region, unwrap
from gtcompile.capture.pristine_model import compiled_forward
from gtcompile.distributed import fsdp
from gtcompile.distributed.fsdp import sharded, whole
from gtcompile.graph.joint_graph import names_of
from gtcompile.graph.names import match_patterns

logger = logging.getLogger(__name__)
NAMED = 5
"""How many parameters a warning names."""


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
    """Drops gradients that eager code computes all the same; present exactly while the parameter is frozen."""
    requires_grad: bool = True
    """The flag as gtcompile last set it: where the parameter has another, somebody else set it."""

    @property
    def frozen(self) -> bool:
        """Whether `train_only` froze the parameter."""
        return self.hook is not None


@dataclass(frozen=True, slots=True)
class Named:
    """The parameter that had a name when the trained set was chosen or last looked at."""

    parameter: TensorWeakRef
    record: Record


_records = WeakIdKeyDictionary()  # nn.Parameter -> Record
_names = WeakIdKeyDictionary()  # nn.Module -> {name: Named}, for models that `train_only` was called with
_generations = itertools.count(1)
_generation = 0


def train_only(model: nn.Module, patterns: Iterable[str] | None) -> frozenset[str]:
    """Train exactly these parameters of `model` from now on.

    The rest get no gradient, so an optimizer skips them altogether: no decay, no moments, no step count.
    Gradients that they have accumulated in `.grad` are dropped. Nothing is compiled here, and a model compiled
    with gtcompile needs no new Dynamo capture.

    The set follows names: a parameter that replaces another is trained or frozen as that one was. New names
    are trained, with a warning, until the next call. `requires_grad_(True)` on a frozen parameter trains it
    again, with a warning, where eager code uses it. Parameters inside compiled regions have
    `requires_grad=True` even while they are frozen, so there only this function can thaw them.

    Args:
        model: compiled or not; for one sharded with `fully_shard` all ranks make the same call.
        patterns: FQNs, or shell-style patterns matched on whole names, of which each must match; None trains
            everything that was trainable when gtcompile first saw the model.

    Returns:
        The trained FQNs.

    Raises:
        ValueError: when a pattern matches nothing (lists near names), or nothing would be trained.
    """
    enter_shards(model)
    follow_names(model)
    selectable = _selectable(model)
    if not selectable:
        raise ValueError(f"{type(unwrap(model)).__name__} has no parameter with requires_grad=True to train")
    trained = frozenset(selectable) if patterns is None else _match(model, selectable, patterns)
    if not trained:
        raise ValueError("expected at least one parameter to train, got no pattern; None trains everything")
    default = Role.EXPECTED if uses_compiled_code(model) else Role.EAGER
    for fqn, parameter in selectable.items():
        if fqn in trained:
            _thaw(parameter)
        else:
            _freeze(parameter, default)
    _remember_names(model)
    fsdp.renew_reduction(unwrap(model))
    _begin_generation()
    return trained


def trained_parameters(model: nn.Module) -> frozenset[str]:
    """FQNs of the parameters that are trained now; tied weights under their first name."""
    follow_names(model)
    return frozenset(fqn for fqn, parameter in _selectable(model).items() if not _is_frozen(parameter))


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether a gradient is wanted for this parameter."""
    return parameter.requires_grad and not _is_frozen(sharded(parameter))


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter requires grad, or did until `train_only` froze it."""
    return parameter.requires_grad or _is_frozen(sharded(parameter))


def selectable_names(model: nn.Module) -> dict[str, str]:
    """From every name of what can be trained, aliases of tied weights included, to the FQN."""
    selectable = _selectable(model)
    return names_of(p for p in list_parameters(unwrap(model)) if p.fqn in selectable)


def generation() -> int:
    """A number that changes whenever `is_trained` may change. Use it as a cache key."""
    return _generation


def _begin_generation() -> None:
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
    parameter.requires_grad_(value)
    if (record := _records.get(parameter)) is not None:
        record.requires_grad = value


def expect_region(parameters: Iterable[nn.Parameter]) -> None:
    """Note that a region may compute these parameters' gradients.

    If eager code turns out to use them, because Dynamo captures nothing of their block, they become EAGER.
    """
    for parameter in map(sharded, parameters):
        _set_role(parameter, Role.EXPECTED)


def enter_region(parameters: Iterable[nn.Parameter]) -> None:
    """Note that a compiled region computes these parameters' gradients."""
    parameters = list(map(sharded, parameters))
    if any(parameter not in _records for parameter in parameters):
        for model in list(_names):  # a new parameter may have the name of one that was frozen
            follow_names(model)
    for parameter in parameters:
        if _record(parameter).role is not Role.REGION:
            # regions know parameters by `id`, which another one may have when this one is gone
            weakref.finalize(parameter, _begin_generation).atexit = False
            _set_role(parameter, Role.REGION)


def leave_to_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Note that eager code alone uses these parameters, unless a region was seen to use them.

    Their flags stay until `train_only` is called, or until a gradient comes for a frozen one: a forward and
    its recomputation by activation checkpointing must see the same flags.
    """
    for parameter in map(sharded, parameters):
        record = _record(parameter)
        if record.role is not Role.REGION:
            record.role = Role.EAGER


def enter_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Forget the roles of parameters whose model is not compiled any more."""
    for parameter in map(sharded, parameters):
        _record(parameter).role = None


def enter_shards(model: nn.Module) -> None:
    """Take notice of a model that was sharded with `fully_shard`; all ranks call it.

    Sharding replaces the parameters of a model, also of one whose blocks were compiled before.
    """
    model = unwrap(model)
    if not fsdp.link(model):
        return
    follow_names(model)
    if uses_compiled_code(model):
        blocks = [module for module in model.modules() if is_compiled(module)]
        inside = {parameter for block in blocks for parameter in block.parameters()}
        enter_region(inside)
        leave_to_eager(parameter for parameter in model.parameters() if parameter not in inside)


def uses_compiled_code(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or any module in it."""
    return runs_as_one_region(model) or any(map(is_compiled, model.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this very module runs compiled code."""
    return module._compiled_call_impl is not None or compiled_forward(module) is not None


def follow_names(model: nn.Module) -> None:
    """Bring the trained set in line with parameters that were replaced, added or thawed by hand.

    A parameter that the model had before under another name, as when an adapter is put around its module,
    keeps its own record.
    """
    model = unwrap(model)
    names: dict[str, Named] | None = _names.get(model)
    if names is None or not fsdp.is_linked(model):
        return
    current = {name: sharded(parameter) for name, parameter in _every_name(model)}
    if all(_is_as_recorded(names.get(name), parameter) for name, parameter in current.items()):
        return
    before = {id(named.parameter()) for named in names.values()}
    foreign = {name: parameter for name, parameter in current.items() if id(parameter) not in before}
    for name in foreign.keys() & names.keys():
        _inherit(foreign[name], names[name].record)
    added = [name for name in foreign.keys() - names.keys() if is_trained(foreign[name])]
    thawed = [name for name, parameter in current.items() if _thaw_if_set_by_hand(parameter)]
    _warn("new since the trained set was chosen, so trained until train_only is called again", added)
    _warn("frozen by train_only and given requires_grad=True by hand, so trained from now on", thawed)
    _remember_names(model)
    _begin_generation()


def notice_replaced_parameters(model: nn.Module, _inputs: object) -> None:
    """Forward pre-hook of models that `train_only` was called with: look whether names must be followed.

    Only at parameters outside compiled modules, so that it takes microseconds: a region that is given a
    parameter it has not seen has the names followed by itself (`enter_region`).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    names: dict[str, Named] = _names.get(model, {})
    if not all(_is_as_recorded(names.get(name), p) for name, p in _outside_compiled(model, "")):
        follow_names(model)


def _remember_names(model: nn.Module) -> None:
    """Note which parameter has which name, and which record, now."""
    model = unwrap(model)
    if notice_replaced_parameters not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(notice_replaced_parameters, prepend=True)
    owned = [(name, sharded(parameter)) for name, parameter in _every_name(model)]
    _names[model] = {name: Named(TensorWeakRef(parameter), _record(parameter)) for name, parameter in owned}


def _every_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by all their names; inside `torch.func.functional_call` other tensors stand in."""
    named = model.named_parameters(remove_duplicate=False)
    return ((name, parameter) for name, parameter in named if isinstance(parameter, nn.Parameter))


def _outside_compiled(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, nn.Parameter):
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None and not is_compiled(child):
            yield from _outside_compiled(child, f"{prefix}{name}.")


def _is_as_recorded(named: Named | None, parameter: nn.Parameter) -> bool:
    if named is None:
        return False
    same = named.parameter() is parameter or named.parameter() is sharded(parameter)
    return same and not _is_set_by_hand(named.record, parameter)


def _is_set_by_hand(record: Record, parameter: nn.Parameter) -> bool:
    """Whether somebody had a parameter require grad that gtcompile froze by `requires_grad=False`."""
    return record.frozen and not record.requires_grad and parameter.requires_grad


def _thaw_if_set_by_hand(parameter: nn.Parameter) -> bool:
    by_hand = _is_set_by_hand(_record(parameter), parameter)
    if by_hand:
        _thaw(parameter)
    return by_hand


def _inherit(parameter: nn.Parameter, former: Record) -> None:
    """Give a parameter the role and the state of the one it replaces."""
    record = _record(parameter)
    if record.role is None:
        # no region has seen this parameter yet
        record.role = Role.EXPECTED if former.role is Role.REGION else former.role
    if former.frozen:
        _freeze(parameter, Role.EAGER)
    else:
        _thaw(parameter)


def _warn(what: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        logger.warning("%s%s: %s", ", ".join(names[:NAMED]), more, what)


def _match(model: nn.Module, selectable: dict[str, nn.Parameter], patterns: Iterable[str]) -> frozenset[str]:
    """The selectable parameters that match; where all patterns are FQNs, aliases are not looked up."""
    if not isinstance(patterns, str):
        patterns = frozenset(patterns)
        if patterns <= selectable.keys():
            return patterns
    return match_patterns(selectable_names(model), patterns)


def _selectable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, or did until `train_only` froze them, by FQN."""
    named = unwrap(model).named_parameters()
    return {fqn: sharded(parameter) for fqn, parameter in named if was_trainable(parameter)}


def _record(parameter: nn.Parameter) -> Record:
    found: Record | None = _records.get(parameter)
    if found is None:
        found = _records[parameter] = Record()
    return found


def _is_frozen(parameter: nn.Parameter) -> bool:
    record: Record | None = _records.get(parameter)
    return record is not None and record.frozen


def _freeze(parameter: nn.Parameter, default: Role) -> None:
    """Freeze a parameter; `default` is its role if none is known."""
    record = _record(parameter)
    record.role = record.role or default
    parameter.grad = None
    if record.hook is None:
        # autograd takes hooks only where a gradient is required; a whole parameter of FSDP's follows the flag
        # of its sharded one when it is next gathered
        differentiable = whole(parameter).requires_grad_()
        record.hook = differentiable.register_post_accumulate_grad_hook(_drop_stray_gradient)
    set_requires_grad(parameter, requires_grad_of(record.role, frozen=True))


def _thaw(parameter: nn.Parameter) -> None:
    record = _record(parameter)
    if record.hook is not None:
        record.hook.remove()
        record.hook = None
        set_requires_grad(parameter, True)


def _set_role(parameter: nn.Parameter, role: Role) -> None:
    record = _record(parameter)
    record.role = role
    if record.frozen:
        set_requires_grad(parameter, requires_grad_of(role, frozen=True))


def _drop_stray_gradient(parameter: torch.Tensor) -> None:
    """Drop a gradient that eager code computed, and have autograd skip the parameter from now on."""
    assert isinstance(parameter, nn.Parameter)
    owner = sharded(parameter)
    record = _record(owner)
    if _is_set_by_hand(record, owner):
        return  # wanted: the next look at the model's names thaws it
    parameter.grad = None
    leave_to_eager([owner])
    set_requires_grad(owner, requires_grad_of(record.role, frozen=True))
