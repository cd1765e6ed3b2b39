"""Compile the modules that a LightningModule calls, and undo it."""

from itertools import chain
from typing import Any

from torch import nn

from gtcompile.compiler.blocks import compile_blocks, find_blocks, uncompile_blocks
from gtcompile.state.trained_set import leave_to_eager, train_only

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def compile_children(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile the repeated blocks of each child of a module; a child without repeated blocks as a whole.

    Children, because `training_step` calls them, and the module itself is often never called: blocks watch
    the first call of the model they are compiled for.

    Args:
        module: its children are changed in place; `uncompile_children` undoes it.
        options: of `compile_blocks`.
    """
    compiled = list(_compilable(module))
    for child in compiled:
        compile_blocks(child, blocks=list(find_blocks(child)) or [""], **options)
    inside = set(chain.from_iterable(child.parameters() for child in compiled))
    leave_to_eager(parameter for parameter in module.parameters() if parameter not in inside)


def uncompile_children(module: nn.Module) -> None:
    """Undo `compile_children`, and train everything again that was trainable before."""
    for child in _compilable(module):
        uncompile_blocks(child)
    train_only(module, None)


def _compilable(module: nn.Module) -> list[nn.Module]:
    """The children with parameters that can be called."""
    return [
        child
        for child in module.children()
        if not isinstance(child, _CONTAINERS) and any(True for _ in child.parameters())
    ]
