"""Detach the outputs of a forward graph that are not the loss."""

from typing import Any

import torch
from torch import fx

from gtcompile.passes.contract import interface_pass


@interface_pass("outputs")
def differentiate_loss_only(forward: fx.GraphModule) -> None:
    """Detach all outputs of a forward graph except scalars; if there is no scalar, change nothing.

    Before: `return (loss, logits)`; the backward adds zeros of shape [batch, length, vocabulary]
    After:  `return (loss, logits.detach())`, and `loss` alone seeds the backward

    Sound if the user differentiates only the loss, which the user must declare. In a graph without a scalar
    output, such as one before a graph break, any output may lead to the loss.

    Args:
        forward: captured by Dynamo, with an `example_value` at every node.
    """
    output = forward.graph.output_node()
    outputs: Any = output.args[0]
    if not any(_is_scalar(node) for node in outputs):
        return
    with forward.graph.inserting_before(output):
        detached = tuple(node if _is_scalar(node) else _detached(forward.graph, node) for node in outputs)
    output.args = (detached,)


def _is_scalar(node: Any) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.requires_grad


def _detached(graph: fx.Graph, node: Any) -> Any:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return node
    detached = graph.call_method("detach", (node,))
    detached.meta["example_value"] = value.detach()
    return detached
