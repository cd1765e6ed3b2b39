"""Finding the autograd node that a compiled region's call made."""

from collections.abc import Iterable, Sequence

import torch

COMPILED = "CompiledFunctionBackward"
"""What AOTAutograd calls its node."""


Histories = frozenset[torch.autograd.graph.Node | None]
"""What tensors were computed by; None for leaves and what needs no gradient."""


def histories(inputs: Iterable[object]) -> Histories:
    """The nodes that the inputs of a call, about to run, were computed by: the call may write into them."""
    return frozenset(value.grad_fn for value in inputs if isinstance(value, torch.Tensor))


def region_node(outputs: Iterable[object], before: Histories) -> torch.autograd.graph.Node | None:
    """The node behind the outputs of one call, or None when nothing needs a gradient.

    Views of outputs are looked through. An output that is an input passed through, and not written into,
    leads to somebody else's node, which is not it.

    Args:
        outputs: of the call.
        before: of its inputs.
    """
    others: set[torch.autograd.graph.Node | None] = set(before)
    todo = [value.grad_fn for value in outputs if isinstance(value, torch.Tensor)]
    while todo:
        node = todo.pop(0)
        if node is None or node in others:
            continue
        if node.name() == COMPILED:
            return node
        others.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
    return None


def places_among_gradients(outputs: Sequence[object], node: torch.autograd.graph.Node) -> dict[int, int]:
    """Where the gradient of each output of a call is among those that its node is given.

    Args:
        outputs: of the call; views of one output share a place, and inputs passed through have none.
        node: of the call.
    """
    places = {}
    for i, output in enumerate(outputs):
        edge = (output.grad_fn, output.output_nr) if isinstance(output, torch.Tensor) else (None, 0)
        while edge[0] is not None and edge[0] is not node:
            edge = next(iter(edge[0].next_functions), (None, 0))
        if edge[0] is node:
            places[i] = edge[1]
    return places
