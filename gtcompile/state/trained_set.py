"""Which parameters are trained now.

Parameters that a compiled region computes gradients for keep `requires_grad=True`, so that no Dynamo guard
ever fails; that they are frozen is written down here, and regions ask. Parameters that eager code uses are
frozen by `requires_grad_`.
"""

import itertools
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gtcompile.capture.model_io import list_parameters, runs_as_one_region, unwrap
from gtcompile.capture.pristine_model import compiled_forward
from gtcompile.distributed import fsdp
from gtcompile.distributed.fsdp import sharded, whole
from gtcompile.graph.joint_graph import names_of
from gtcompile.graph.names import match_patterns

_frozen = WeakIdKeyDictionary()  # parameter -> handle of the hook that drops stray gradients
_in_region = WeakIdKeyDictionary()  # the keys: parameters whose gradients a compiled region computes
_expected = WeakIdKeyDictionary()  # the keys: parameters of compiled blocks, whether or not these have run
_outside = WeakIdKeyDictionary()  # the keys: parameters of compiled models that eager code alone used so far
_generation = itertools.count(1)
_current_generation = 0


def train_only(model: nn.Module, patterns: Iterable[str] | None) -> frozenset[str]:
    """Train exactly these parameters of `model` from now on.

    The rest get no gradient: an optimizer skips them altogether (no decay, no moments, no step count). What
    they had accumulated in `.grad` so far is dropped, so they stay as they are. Nothing is compiled here, and
    a model compiled with gtcompile needs no new Dynamo capture for it.

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
    selectable = _selectable(model)
    if not selectable:
        raise ValueError(f"{type(unwrap(model)).__name__} has no parameter with requires_grad=True to train")
    trained = frozenset(selectable) if patterns is None else _match(model, selectable, patterns)
    if not trained:
        raise ValueError("expected at least one parameter to train, got no pattern; None trains everything")
    compiled = uses_compiled_code(model)
    for fqn, parameter in selectable.items():
        if fqn in trained:
            _thaw(parameter)
        else:
            _freeze(parameter, outside=_is_outside(parameter, compiled))
    fsdp.renew_reduction(unwrap(model))
    _begin_generation()
    return trained


def trained_parameters(model: nn.Module) -> frozenset[str]:
    """FQNs of the parameters that are trained now; tied weights under their first name."""
    return frozenset(fqn for fqn, parameter in _selectable(model).items() if parameter not in _frozen)


def _match(model: nn.Module, selectable: dict[str, nn.Parameter], patterns: Iterable[str]) -> frozenset[str]:
    """The selectable parameters that match; where all are FQNs, aliases are not looked up."""
    if not isinstance(patterns, str):
        patterns = frozenset(patterns)
        if patterns <= selectable.keys():
            return patterns
    return match_patterns(selectable_names(model), patterns)


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether a gradient is wanted for this parameter."""
    return parameter.requires_grad and sharded(parameter) not in _frozen


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter asks for a gradient, or did until `train_only` froze it."""
    return parameter.requires_grad or sharded(parameter) in _frozen


def generation() -> int:
    """Counts what changes answers of `is_trained`: what was worked out from them holds until it changes."""
    return _current_generation


def _begin_generation() -> None:
    global _current_generation
    _current_generation = next(_generation)


def enter_region(parameters: Iterable[nn.Parameter]) -> None:
    """Note that a compiled region computes these parameters' gradients: to Dynamo all look trained.

    Regions know them by their identity, which another parameter may have when one is gone.
    """
    for parameter in map(sharded, parameters):
        if parameter not in _in_region:
            _in_region[parameter] = True
            weakref.finalize(parameter, _begin_generation).atexit = False
        if parameter in _frozen:
            parameter.requires_grad_(True)


def expect_region(parameters: Iterable[nn.Parameter]) -> None:
    """Note that a region may compute these parameters' gradients: until one does they look trained to Dynamo.

    Those that eager code turns out to use, of blocks that Dynamo does not capture, are frozen as such then.
    """
    for parameter in map(sharded, parameters):
        _expected[parameter] = True
        if parameter in _frozen:
            parameter.requires_grad_(True)


def leave_to_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Note that eager code alone uses these parameters of a model otherwise compiled."""
    for parameter in map(sharded, parameters):
        _outside[parameter] = True


def enter_shards(model: nn.Module) -> None:
    """Take notice of a model that was sharded with `fully_shard`; all ranks call it.

    Sharding makes other parameters of a model's, also where its blocks were compiled before.
    """
    model = unwrap(model)
    if fsdp.link(model) and uses_compiled_code(model):
        blocks = [module for module in model.modules() if is_compiled(module)]
        inside = {parameter for block in blocks for parameter in block.parameters()}
        enter_region(inside)
        leave_to_eager(parameter for parameter in model.parameters() if parameter not in inside)


def enter_eager(parameters: Iterable[nn.Parameter]) -> None:
    """Forget that parameters belong to regions or to the eager rest: their model is not compiled any more."""
    for parameter in map(sharded, parameters):
        for known in (_in_region, _expected, _outside):
            known.pop(parameter, None)


def uses_compiled_code(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model or any module in it."""
    return runs_as_one_region(model) or any(map(is_compiled, model.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this very module runs compiled code."""
    return module._compiled_call_impl is not None or compiled_forward(module) is not None


def _selectable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that ask for a gradient, or did until `train_only` froze them, under their first name."""
    named = unwrap(model).named_parameters()
    return {fqn: sharded(parameter) for fqn, parameter in named if was_trainable(parameter)}


def selectable_names(model: nn.Module) -> dict[str, str]:
    """From every name of what can be trained, aliases of tied weights included, to the FQN."""
    selectable = _selectable(model)
    return names_of(p for p in list_parameters(unwrap(model)) if p.fqn in selectable)


def _is_outside(parameter: nn.Parameter, compiled: bool) -> bool:
    """Whether eager code alone uses a parameter of a model that is compiled or is not."""
    if parameter in _in_region:
        return False
    expected = compiled or parameter in _expected  # whatever was put around the block since
    return not expected or parameter in _outside or not parameter.requires_grad


def _freeze(parameter: nn.Parameter, *, outside: bool) -> None:
    parameter.grad = None
    if parameter not in _frozen:
        given = whole(parameter).requires_grad_()  # as the parameter: a whole one follows when next gathered
        _frozen[parameter] = given.register_post_accumulate_grad_hook(_drop_stray_gradient)
    if outside:
        parameter.requires_grad_(False)


def _thaw(parameter: nn.Parameter) -> None:
    handle = _frozen.pop(parameter, None)
    if handle is not None:
        handle.remove()
        parameter.requires_grad_(True)


def _drop_stray_gradient(parameter: torch.Tensor) -> None:
    """Drop a gradient that eager code computed, and have autograd skip it from now on."""
    assert isinstance(parameter, nn.Parameter)
    parameter.grad = None
    if sharded(parameter) not in _in_region:
        sharded(parameter).requires_grad_(False)
        _outside[sharded(parameter)] = True
