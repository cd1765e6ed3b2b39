"""Reduce the outputs of a captured forward to the loss, and to those that cost FLOPs of their own."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx

from gtcompile.graph.flops import has_flops
from gtcompile.graph.joint_graph import ancestors, count_forward_outputs
from gtcompile.passes.contract import interface_pass
from gtcompile.torch_internals import InputMutationAOTOutput


@interface_pass("outputs")
def keep_costly_outputs(module: fx.GraphModule) -> None:
    """Put the loss first; drop every other forward output unless it takes FLOPs that the loss does not need.

    Before: `return (new_running_mean, loss, logits, mm(logits, q), dw)`
    After:  `return (loss, mm(logits, q), dw)`

    Sound because a training step differentiates the loss alone. The FLOPs of the other outputs are spent
    even if nobody reads them, so outputs that cost any stay, for the costs to count. What a forward writes to
    its inputs comes before the loss in AOTAutograd's order, and costs nothing once the loss is computed.

    Args:
        module: a joint graph with AOTAutograd's descriptors, the loss its first output that is no mutation.
    """
    output = module.graph.output_node()
    outputs: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    descriptors: Sequence[object] = output.meta["desc"]
    first = next(i for i, desc in enumerate(descriptors) if not isinstance(desc, InputMutationAOTOutput))
    outputs, descriptors = _moved_to_front(outputs, first), _moved_to_front(descriptors, first)
    kept = _are_costly(outputs[: count_forward_outputs(descriptors)])
    kept += [True] * (len(outputs) - len(kept))
    output.args = (tuple(itertools.compress(outputs, kept)),)
    output.meta["desc"] = list(itertools.compress(descriptors, kept))
    module.graph.eliminate_dead_code()


def _are_costly(forward: Sequence[Any]) -> list[bool]:
    """For each forward output, the loss first, whether it is kept."""
    loss, *others = forward
    of_loss = ancestors([loss])
    needed = (ancestors([node]) - of_loss if isinstance(node, fx.Node) else () for node in others)
    return [True, *(any(map(has_flops, nodes)) for nodes in needed)]


def _moved_to_front(values: Sequence[Any], position: int) -> list[Any]:
    return [values[position], *values[:position], *values[position + 1 :]]
