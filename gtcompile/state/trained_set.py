"""Choose and query the set of trained parameters."""

import weakref
from collections.abc import Iterable

from torch import nn

from gtcompile.capture.model_io import list_parameters, unwrap
from gtcompile.capture.pristine_model import is_compiled, uses_compiled_code
from gtcompile.distributed import fsdp
from gtcompile.distributed.fsdp import sharded
from gtcompile.graph.joint_graph import names_of
from gtcompile.graph.names import match_patterns
from gtcompile.state.ever_trained import mark_names_trained
from gtcompile.state.parameter_records import (
    Role,
    begin_generation,
    enter_eager,
    expect_region,
    freeze,
    generation,
    is_frozen,
    is_recorded,
    is_trained,
    leave_to_eager,
    record_of,
    set_role,
    thaw,
    was_trainable,
)
from gtcompile.state.replaced_parameters import begin_following, follow_names, followed_models

__all__ = [
    "enter_eager",
    "enter_region",
    "enter_shards",
    "expect_region",
    "generation",
    "is_trained",
    "leave_to_eager",
    "selectable_names",
    "set_trained",
    "train_only",
    "trained_parameters",
    "was_trainable",
]


def train_only(model: nn.Module, patterns: Iterable[str] | None) -> frozenset[str]:
    """Train exactly these parameters of `model` from now on.

    All others are frozen. They get no gradient, so an optimizer skips them entirely: no decay, no change of
    moments or step counts. Their accumulated `.grad` is dropped. Nothing is compiled here, and a model
    compiled with gtcompile needs no new Dynamo capture.

    The set follows names: if a parameter replaces another under its name, it is trained or frozen like that
    one. Parameters with new names are trained, with a warning, until the next call. If eager code uses a
    frozen parameter, `requires_grad_(True)` trains it again, with a warning. Parameters in compiled regions
    have `requires_grad=True` even while frozen, so only this function can thaw them.

    Args:
        model: compiled or not. If it is sharded with `fully_shard`, all ranks must make the same call.
        patterns: FQNs or shell-style patterns, matched on whole names. Each must match something. None trains
            everything that was trainable when gtcompile first saw the model.

    Returns:
        The FQNs of the trained parameters.

    Raises:
        TypeError: `patterns` is a single string.
        ValueError: a pattern matches nothing (the message lists near names), or nothing would be trained.
    """
    trained = set_trained(model, patterns)
    if patterns is not None:  # everything is also what one returns to after training
        mark_names_trained(model, trained)
    return trained


def set_trained(model: nn.Module, patterns: Iterable[str] | None) -> frozenset[str]:
    """Do what `train_only` does, for sets that count as trained only if an optimizer steps them."""
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
            thaw(parameter)
        else:
            freeze(parameter, default)
    begin_following(model)
    fsdp.renew_reduction(unwrap(model))
    begin_generation()
    return trained


def trained_parameters(model: nn.Module) -> frozenset[str]:
    """Return the FQNs of the parameters that are trained now. Tied weights have their first name."""
    follow_names(model)
    return frozenset(fqn for fqn, parameter in _selectable(model).items() if not is_frozen(parameter))


def selectable_names(model: nn.Module) -> dict[str, str]:
    """Map each name of each trainable parameter, aliases of tied weights included, to its FQN."""
    selectable = _selectable(model)
    return names_of(p for p in list_parameters(unwrap(model)) if p.fqn in selectable)


def enter_region(parameters: Iterable[nn.Parameter]) -> None:
    """Set the role REGION: a compiled region computes these parameters' gradients."""
    parameters = list(map(sharded, parameters))
    if not all(map(is_recorded, parameters)):
        for model in followed_models():  # a new parameter may have replaced a frozen one
            follow_names(model)
    for parameter in parameters:
        if record_of(parameter).role is not Role.REGION:
            # regions identify parameters by `id`, which Python may reuse after this one is deleted
            weakref.finalize(parameter, begin_generation).atexit = False
            set_role(parameter, Role.REGION)


def enter_shards(model: nn.Module) -> None:
    """Update the records after a model was sharded with `fully_shard`. All ranks must call it.

    Sharding replaces the parameters of a model, even if its blocks were compiled before.
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


def _match(model: nn.Module, selectable: dict[str, nn.Parameter], patterns: Iterable[str]) -> frozenset[str]:
    """Return the selectable parameters that match. If all patterns are FQNs, no aliases are looked up."""
    if not isinstance(patterns, str):
        patterns = frozenset(patterns)
        if patterns <= selectable.keys():
            return patterns
    return match_patterns(selectable_names(model), patterns)


def _selectable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, or did before `train_only` froze them, by FQN."""
    named = unwrap(model).named_parameters()
    return {fqn: sharded(parameter) for fqn, parameter in named if was_trainable(parameter)}
