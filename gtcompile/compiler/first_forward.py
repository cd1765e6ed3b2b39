"""The first forward of compiled blocks, in which they learn what may ever ask for a gradient.

Dynamo captures a block for inputs that ask for a gradient or do not. Where the first trained set leaves
blocks frozen, their inputs do not, and the first set that reaches deeper would need a second capture. So in
the first forward outputs of frozen modules ask for a gradient that goes nowhere, until every block was called
once; blocks note which of their inputs ask, and cut those that nothing trained is upstream of.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from gtcompile.compiler.cuts import ask, keep_asking
from gtcompile.state import trained_set
from gtcompile.torch_internals import compiled_code_stands_aside, tree_map


class FirstForward:
    """Lasts from the first call of a model with gradients enabled until each of its blocks was called.

    Args:
        model: what is called; it has hooks until then.
        blocks: the compiled modules in it.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self._blocks = frozenset(blocks)
        self._waiting: set[nn.Module] = set()
        self._began = False
        self._handles = [model.register_forward_pre_hook(self._begin)]
        self._handles += [model.register_forward_hook(self._end, always_call=True)]

    def called(self, block: nn.Module) -> None:
        """Note that a block is about to run with gradients enabled."""
        if self._waiting:
            self._waiting.discard(block)
            keep_asking(self, bool(self._waiting))

    def forget(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, _inputs: object) -> None:
        compiled = all(map(trained_set.is_compiled, self._blocks))
        eager = torch.compiler.is_compiling() or compiled_code_stands_aside()
        if not compiled or eager or not torch.is_grad_enabled():
            return  # the blocks run eagerly this time
        self._began, self._waiting = True, set(self._blocks)
        self._handles += [module.register_forward_hook(self._ask) for module in self._frozen_rest(model)]
        keep_asking(self, True)

    def _end(self, _model: nn.Module, _inputs: object, _output: object) -> None:
        if self._began:
            self._waiting.clear()  # of blocks that the model did not call
            keep_asking(self, False)
            self.forget()

    def _frozen_rest(self, model: nn.Module) -> Iterator[nn.Module]:
        """Modules outside the blocks with frozen parameters of their own."""
        inside = {module for block in self._blocks for module in block.modules()}
        for module in model.modules():
            own = module.parameters(recurse=False)
            if module not in inside and any(
                trained_set.was_trainable(p) and not p.requires_grad for p in own
            ):
                yield module

    def _ask(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        return tree_map(_asking, output) if self._waiting else output


def _asking(value: Any) -> Any:
    """A tensor that asks for a gradient, where it can and does not."""
    differentiable = isinstance(value, torch.Tensor) and value.is_floating_point()
    return ask(value) if differentiable and not value.requires_grad else value
