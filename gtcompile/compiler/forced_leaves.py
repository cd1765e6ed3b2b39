"""Forced leaves: tensors that were made to ask for a gradient nobody wants.

Outputs of frozen embeddings do where activation checkpointing is enabled as transformers and PEFT do it, and
the backward then runs down to them through every frozen block; which tensor it was is noticed where
embeddings return. So do cuts, of which eager code has copies in a first forward (`first_forward.py`). Blocks
ask here whether anything trained is upstream of their inputs.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.compiler.cuts import is_cut, is_history_of_a_cut, keeps_asking
from gtcompile.state import trained_set

REENTRANT = "CheckpointFunctionBackward"
"""What autograd calls the node of a reentrant checkpoint."""
_embedded = WeakTensorKeyDictionary()  # the keys: what embeddings returned without a history
_WANTED = "gtcompile.wanted"  # in an autograd node's metadata: whether something trained is upstream
_ASKED = "gtcompile.capture.forced_gradients"  # the same, where whatever Python differentiates counts as something trained


def watch_embeddings(model: nn.Module) -> None:
    """Notice from now on what the model's frozen embeddings return; watching twice does no harm."""
    for module in _embeddings(model):
        if _notice not in module._forward_hooks.values():
            module.register_forward_hook(_notice)


def unwatch_embeddings(model: nn.Module) -> None:
    """Take the hooks away that `watch_embeddings` put there."""
    for module in _embeddings(model):
        for key in [key for key, hook in module._forward_hooks.items() if hook is _notice]:
            del module._forward_hooks[key]


def needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether a tensor's gradient reaches anything but frozen parameters and forced leaves.

    Without a forced leaf alive this is not looked into: then autograd's own answer, yes, holds.

    Args:
        tensor: any; its history is walked up to the first thing that wants a gradient.
    """
    if tensor.grad_fn is None:
        return _leaf_wants(tensor)
    known = _metadata(tensor.grad_fn).get(_WANTED)  # a checkpointed block asks again
    if known is None and (keeps_asking() or _is_forced_leaf_alive()):
        known = _metadata(tensor.grad_fn)[_WANTED] = _reaches_wanted(tensor.grad_fn)
    return known is not False


def wants_gradient(value: object) -> bool:
    """Whether a region's backward must hand a gradient to this input.

    What eager code between the regions of one block made of a cut has a history, and yet wants none.
    """
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    if is_cut(value):
        return False
    if value.grad_fn is None or isinstance(value.grad_fn, BackwardCFunction):  # another region made it
        return True
    metadata = _metadata(value.grad_fn)
    if _ASKED not in metadata:
        metadata[_ASKED] = _reaches_wanted(value.grad_fn, opaque=BackwardCFunction)
    return bool(metadata[_ASKED])


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module
        elif callable(find := getattr(module, "get_input_embeddings", None)):
            try:
                found = find()
            except NotImplementedError:  # transformers' way to say that a model has none
                continue
            if isinstance(found, nn.Module):
                yield found


def _notice(_module: nn.Module, _inputs: object, output: object) -> None:
    """Remember an embedding's output before or after another hook makes it require a gradient."""
    if torch.compiler.is_compiling() or not isinstance(output, torch.Tensor):
        return
    if torch.is_grad_enabled() and output.grad_fn is None:
        _embedded[output] = True


def _is_forced_leaf_alive() -> bool:
    # the length first: every block asks, and walking over weak references takes longer than all the rest
    return len(_embedded) > 0 and any(leaf.requires_grad for leaf in _embedded)


def _leaf_wants(leaf: torch.Tensor) -> bool:
    if isinstance(leaf, nn.Parameter):
        return trained_set.is_trained(leaf)
    return leaf not in _embedded and not is_cut(leaf)


def _reaches_wanted(start: torch.autograd.graph.Node, opaque: type | tuple[()] = ()) -> bool:
    """Whether a history has anything that wants a gradient, or a node of a kind that may hide it."""
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        # parameters of what is recomputed are no part of the history
        hidden = node.name() == REENTRANT or (isinstance(node, opaque) and not is_history_of_a_cut(node))
        if hidden or _metadata(node).get(_WANTED) or (leaf is not None and _leaf_wants(leaf)):
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        todo.extend(parents)
    return False


def _metadata(node: torch.autograd.graph.Node) -> dict[str, Any]:
    metadata: Any = node.metadata  # a dictionary, though declared as a method that returns one
    return cast("dict[str, Any]", metadata)
