"""Follow names: hand a parameter's record on to the one that replaces it.

Records belong to parameter objects, but people choose names. Loading with `assign=True`, resizing embeddings
or moving a model off the meta device puts new parameters under the old names. So `train_only` also keeps the
record of every name of a model, and `follow_names` brings parameters in line with it.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from gtcompile.capture.model_io import unwrap
from gtcompile.capture.pristine_model import is_compiled
from gtcompile.distributed import fsdp
from gtcompile.distributed.fsdp import sharded
from gtcompile.state.parameter_records import (
    Record,
    Role,
    begin_generation,
    freeze,
    is_set_by_hand,
    is_trained,
    record_of,
    thaw,
)

logger = logging.getLogger(__name__)
NAMED = 5
"""How many parameters a warning names."""


@dataclass(frozen=True, slots=True)
class Named:
    """The parameter that had a name when the trained set was chosen or last looked at."""

    parameter: TensorWeakRef
    record: Record


_names = WeakIdKeyDictionary()  # nn.Module -> {name: Named}, for models that `train_only` was called with


def follow_names(model: nn.Module) -> None:
    """Bring the trained set in line with parameters that were replaced, added or thawed by hand.

    A parameter that the model had before under another name, as when an adapter is put around its module,
    keeps its own record.
    """
    model = unwrap(model)
    names: dict[str, Named] | None = _names.get(model)
    if names is None or all(_is_as_recorded(names.get(name), p) for name, p in _every_name(model)):
        return
    if not fsdp.is_linked(model):
        return  # which sharded parameter stands for which whole one is not known yet
    current = {name: sharded(parameter) for name, parameter in _every_name(model)}
    before = {id(named.parameter()) for named in names.values()}
    foreign = {name: parameter for name, parameter in current.items() if id(parameter) not in before}
    for name in foreign.keys() & names.keys():
        _inherit(foreign[name], names[name].record)
    added = [name for name in foreign.keys() - names.keys() if is_trained(foreign[name])]
    thawed = [name for name, parameter in current.items() if _thaw_if_set_by_hand(parameter)]
    _warn("new since the trained set was chosen, so trained until train_only is called again", added)
    _warn("frozen by train_only and given requires_grad=True by hand, so trained from now on", thawed)
    _remember_names(model)
    begin_generation()


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


def begin_following(model: nn.Module) -> None:
    """Follow the names of this model from now on."""
    model = unwrap(model)
    if model not in _names:
        _remember_names(model)
    if notice_replaced_parameters not in model._forward_pre_hooks.values():  # a deep copy has it already
        model.register_forward_pre_hook(notice_replaced_parameters, prepend=True)


def _remember_names(model: nn.Module) -> None:
    """Note which parameter has which name, and which record, now."""
    owned = [(name, sharded(parameter)) for name, parameter in _every_name(model)]
    _names[model] = {name: Named(TensorWeakRef(parameter), record_of(parameter)) for name, parameter in owned}


def followed_models() -> list[nn.Module]:
    """The models that `train_only` was called with, as far as they are still there."""
    return list(_names)


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
    return same and not is_set_by_hand(named.record, parameter)


def _thaw_if_set_by_hand(parameter: nn.Parameter) -> bool:
    by_hand = is_set_by_hand(record_of(parameter), parameter)
    if by_hand:
        thaw(parameter)
    return by_hand


def _inherit(parameter: nn.Parameter, former: Record) -> None:
    """Give a parameter the role and the state of the one it replaces."""
    record = record_of(parameter)
    if record.role is None:
        # no region has seen this parameter yet
        record.role = Role.EXPECTED if former.role is Role.REGION else former.role
    if former.frozen:
        freeze(parameter, Role.EAGER)
    else:
        thaw(parameter)


def _warn(what: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        logger.warning("%s%s: %s", ", ".join(names[:NAMED]), more, what)
