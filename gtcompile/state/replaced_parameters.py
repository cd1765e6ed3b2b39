"""Give a parameter that replaces another the record of the replaced one.

Records belong to parameter objects, but users choose names. Loading with `assign=True`, resizing embeddings
or moving a model off the meta device registers new parameters under old names. So `train_only` also stores
the record of every name of a model, and `follow_names` updates the parameters accordingly.
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
from gtcompile.errors import some
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


@dataclass(frozen=True, slots=True)
class Named:
    """The parameter and record that a name had at the last `train_only` or `follow_names`."""

    parameter: TensorWeakRef
    record: Record


_names = WeakIdKeyDictionary()  # nn.Module -> {name: Named}, for models that `train_only` was called with


def follow_names(model: nn.Module) -> None:
    """Update the trained set after the user replaced, added or thawed parameters.

    A parameter that the model already had under another name keeps its record. This happens when an adapter
    wraps its module.
    """
    model = unwrap(model)
    names: dict[str, Named] | None = _names.get(model)
    if names is None or all(_is_as_recorded(names.get(name), p) for name, p in _every_name(model)):
        return
    if not fsdp.is_linked(model):
        return  # the mapping from whole to sharded parameters is not known yet
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
    """Forward pre-hook of models that `train_only` was called with: call `follow_names` if necessary.

    It checks only parameters outside compiled modules, so it takes microseconds. A region that receives an
    unknown parameter calls `follow_names` itself (in `enter_region`).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    names: dict[str, Named] = _names.get(model, {})
    if not all(_is_as_recorded(names.get(name), p) for name, p in _outside_compiled(model, "")):
        follow_names(model)


def begin_following(model: nn.Module) -> None:
    """Record the names of a model, and check them before every forward from now on."""
    model = unwrap(model)
    if model not in _names:
        _remember_names(model)
    if notice_replaced_parameters not in model._forward_pre_hooks.values():  # a deep copy has it already
        model.register_forward_pre_hook(notice_replaced_parameters, prepend=True)


def _remember_names(model: nn.Module) -> None:
    """Store the current parameter and record of every name."""
    owned = [(name, sharded(parameter)) for name, parameter in _every_name(model)]
    _names[model] = {name: Named(TensorWeakRef(parameter), record_of(parameter)) for name, parameter in owned}


def followed_models() -> list[nn.Module]:
    """Return the models that `train_only` was called with and that still exist."""
    return list(_names)


def _every_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter with each of its names. Tensors put in by `functional_call` are left out."""
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
    """Give a parameter the role of the one it replaces, and freeze or thaw it accordingly."""
    record = record_of(parameter)
    record.ever_trained |= former.ever_trained
    if record.role is None:
        # no region has seen this parameter yet
        record.role = Role.EXPECTED if former.role is Role.REGION else former.role
    if former.frozen:
        freeze(parameter, Role.EAGER)
    else:
        thaw(parameter)


def _warn(what: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        logger.warning("%s: %s", some(names, most=5), what)
