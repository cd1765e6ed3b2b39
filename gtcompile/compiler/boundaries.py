"""Autograd boundaries: where a backward ends because nothing upstream is trained.

For each of their inputs, compiled blocks and regions must know whether its gradient reaches a trained
parameter: `needs_gradient` finds out. Autograd's own flag, `requires_grad`, is true too often:

* Activation checkpointing, as transformers and PEFT enable it, makes the outputs of embeddings require grad,
  frozen or not. The backward would run down to them through every frozen block.
* Dynamo guards on `requires_grad`, so a block's inputs keep the flag when the blocks before it are frozen.

Where an input needs no gradient, a `boundary` replaces it: it requires grad, and the backward ends there.
"""

import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.capture.pristine_model import is_compiled
from gtcompile.state import trained_set
from gtcompile.torch_internals import FSDP_POST_BACKWARD_NODE, compiled_code_is_off, tree_map

_NEEDED = "gtcompile.needed"  # in an autograd node's metadata: what `needs_gradient` found
_embedded = WeakTensorKeyDictionary()  # the keys: outputs of watched embeddings that had no history


class _Boundary(torch.autograd.Function):
    """Returns a leaf's memory as a tensor with a history, because autograd refuses writes into a leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.data  # autograd would refuse writes into what `detach` returns

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


_BOUNDARY_NODE = f"{_Boundary.__name__}Backward"  # as autograd names the nodes of a function


def boundary(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that shares the memory of `tensor` and requires grad, and where a backward ends."""
    leaf = tensor.detach().requires_grad_()
    passed: torch.Tensor = _Boundary.apply(leaf)  # type: ignore[no-untyped-call]
    return passed


def boundary_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a boundary with memory of its own, for eager code that may write into it."""
    return boundary(tensor).clone()


def end_backward(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a tensor from its history; during a calibration the result still requires grad."""
    return boundary_copy(tensor) if calibrating() else tensor.detach()


def needs_gradient(value: object) -> bool:
    """Whether the gradient of a value reaches a trained parameter or a leaf that the user differentiates.

    In doubt the answer is True: some autograd functions hide parts of the history.

    Args:
        value: anything; the history of a tensor is searched up to the first node that needs a gradient.
    """
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    start = value.grad_fn
    if start is None:
        return _leaf_needs_gradient(value)
    known = _known(start)
    if known is None:
        # kept, because the recomputation of a checkpointed block searches again
        known = _metadata(start)[_NEEDED] = _search(start)
    return known


def _search(start: torch.autograd.graph.Node) -> bool:
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        known = _known(node)
        if known:
            return True
        if known is None:
            parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
            seen |= parents
            todo.extend(parents)
    return False


def _known(node: torch.autograd.graph.Node) -> bool | None:
    """Whether one node needs a gradient; None if that depends on its parents."""
    if isinstance(node, BackwardCFunction):
        return _known_of_python(node.name())
    leaf = getattr(node, "variable", None)
    if leaf is not None:
        return _leaf_needs_gradient(leaf)
    found: bool | None = _metadata(node).get(_NEEDED)
    return found


def _known_of_python(name: str) -> bool | None:
    """Whether the node of an `autograd.Function` needs a gradient; None if that depends on its parents.

    Searching the parents is not enough, because the history may lack parameters that the backward
    differentiates: those of the block in a reentrant checkpoint, for example. So the answer is True. It is
    exact for compiled regions, whose outputs have no history if they depend on nothing trained.
    """
    if name == FSDP_POST_BACKWARD_NODE:
        return None
    return name != _BOUNDARY_NODE


def _leaf_needs_gradient(leaf: torch.Tensor) -> bool:
    """Whether a leaf is a trained parameter, or requires grad for another reason than checkpointing."""
    if isinstance(leaf, nn.Parameter):
        return trained_set.is_trained(leaf)
    return leaf not in _embedded


def _metadata(node: torch.autograd.graph.Node) -> dict[str, Any]:
    metadata: Any = node.metadata  # a dictionary, though declared as a method that returns one
    return cast("dict[str, Any]", metadata)


def watch_embeddings(model: nn.Module) -> None:
    """Record the outputs of frozen embeddings, which checkpointing makes require grad, for `needs_gradient`.

    A second call for the same model does nothing.
    """
    for module in _embeddings(model):
        if _note_output not in module._forward_hooks.values():
            module.register_forward_hook(_note_output)


def unwatch_embeddings(model: nn.Module) -> None:
    """Undo `watch_embeddings`."""
    for module in _embeddings(model):
        for key in [key for key, hook in module._forward_hooks.items() if hook is _note_output]:
            del module._forward_hooks[key]


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module
        elif callable(find := getattr(module, "get_input_embeddings", None)):
            try:
                found = find()
            except NotImplementedError:  # how transformers says that a model has none
                continue
            if isinstance(found, nn.Module):
                yield found


def _note_output(_module: nn.Module, _inputs: object, output: object) -> None:
    """Forward hook: remember the output of a frozen embedding.

    The checkpointing hook that makes it require grad may run before this one or after it, so `requires_grad`
    is not looked at; a trained embedding's output has a history.
    """
    if torch.compiler.is_compiling() or not isinstance(output, torch.Tensor):
        return
    if torch.is_grad_enabled() and output.grad_fn is None:
        _embedded[output] = True


class _Active(threading.local):
    """The calibrations under way in this thread."""

    def __init__(self) -> None:
        self.calibrations: set[Calibration] = set()


class Calibration:
    """The first forward of compiled blocks, which shows which inputs may ever need a gradient.

    Dynamo captures a block for inputs that require grad, or for inputs that do not. If the first trained set
    left a prefix of blocks frozen, the first set that reaches deeper would need a second capture. So until
    every block was called once, boundaries replace the outputs of frozen modules and blocks.

    Args:
        model: has hooks until its first forward with gradients enabled is over.
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
        if not self._waiting:
            return
        self._waiting.discard(block)
        if not self._waiting:
            _active.calibrations.discard(self)

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, _inputs: object) -> None:
        compiled = all(map(is_compiled, self._blocks))
        eager = torch.compiler.is_compiling() or compiled_code_is_off()
        if not compiled or eager or not torch.is_grad_enabled():
            return  # the blocks run eagerly this time
        self._began, self._waiting = True, set(self._blocks)
        self._handles += [
            module.register_forward_hook(self._make_require_grad) for module in self._frozen_rest(model)
        ]
        _active.calibrations.add(self)

    def _end(self, _model: nn.Module, _inputs: object, _output: object) -> None:
        if self._began:
            self._waiting.clear()  # of blocks that the model did not call
            _active.calibrations.discard(self)
            self.remove_hooks()

    def _frozen_rest(self, model: nn.Module) -> Iterator[nn.Module]:
        """Modules outside the blocks with frozen parameters of their own."""
        inside = {module for block in self._blocks for module in block.modules()}
        for module in model.modules():
            own = module.parameters(recurse=False)
            if module not in inside and any(
                trained_set.was_trainable(p) and not p.requires_grad for p in own
            ):
                yield module

    def _make_require_grad(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        return tree_map(_requiring_grad, output) if self._waiting else output


_active = _Active()


def calibrating() -> bool:
    """Whether a model in this thread is in its first forward."""
    return bool(_active.calibrations)


def _requiring_grad(value: Any) -> Any:
    """A boundary in place of a tensor that could require grad and does not."""
    differentiable = isinstance(value, torch.Tensor) and value.is_floating_point()
    return boundary_copy(value) if differentiable and not value.requires_grad else value
