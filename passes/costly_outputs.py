"""Reduce the forward outputs to the loss, and to outputs that cost additional FLOPs."""

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
    """Put the loss first, and drop the other forward outputs that cost no FLOPs beyond those of the loss.

    Before: `return (new_running_mean, loss, logits, mm(logits, q), dw)`
    After:  `return (loss, mm(logits, q), dw)`

    Sound because a training step differentiates only the loss. The FLOPs of other outputs are spent even if
    nobody reads them, so outputs with additional FLOPs stay and are counted. AOTAutograd puts mutations of
    inputs (batch-norm statistics) before the loss; they cost nothing in addition to it.

    Args:
        module: a joint graph with AOTAutograd's descriptors. The first output that is not a mutation is the
            loss.
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
    """Return for each forward output, the loss first, whether to keep it."""
    loss, *others = forward
    of_loss = ancestors([loss])
    needed = (ancestors([node]) - of_loss if isinstance(node, fx.Node) else () for node in others)
    return [True, *(any(map(has_flops, nodes)) for nodes in needed)]


def _moved_to_front(values: Sequence[Any], position: int) -> list[Any]:
    return [values[position], *values[:position], *values[position + 1 :]]
