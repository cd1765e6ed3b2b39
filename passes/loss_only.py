"""Drop the tangents of outputs that nobody differentiates."""

import copy
from typing import Any

import torch
from torch import fx


def differentiate_loss_only(graph: fx.GraphModule) -> fx.GraphModule:
    """Detach every output of a forward graph but its scalars, when it has one.

    Before: `return (loss, logits)`; the backward adds zeros of batch x length x vocabulary
    After:  `return (loss, logits.detach())`, and a backward seeded by `loss` alone

    Sound when nobody differentiates the other outputs, which only the user can know. A graph without a scalar
    output, such as what comes before a graph break, is returned as it is: all that it returns may lead to the
    loss.

    Args:
        graph: as Dynamo captured it; left as it is.
    """
    graph = copy.deepcopy(graph)
    output = graph.graph.output_node()
    outputs: Any = output.args[0]
    if not any(_is_scalar(node) for node in outputs):
        return graph
    with graph.graph.inserting_before(output):
        output.args = (tuple(node if _is_scalar(node) else _detached(graph.graph, node) for node in outputs),)
    graph.recompile()
    return graph


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
