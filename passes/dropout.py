"""Leave only the drawing of dropout's mask to eager PyTorch; generated code multiplies by it."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def split_dropout(graph: fx.Graph) -> None:
    """Split dropout on a CPU into the drawing of its mask and two products, which can be fused with others.

    Before: `y, mask = native_dropout(x, p, True)`
    After:  `mask = bernoulli(empty(x.shape, dtype=bool), 1 - p)`, `y = x * mask * scale`

    `scale` is 1 / (1 - p) rounded to the dtype of `x`, so that `y` is bit-equal to what
    `torch.nn.functional.dropout` computes without compilation (`_dropout_impl` in torch's `Dropout.cpp`),
    which `native_dropout` is not for every p. Both draw in the order of memory, so only a contiguous `x` is
    rewritten; other devices draw in another way.

    Args:
        graph: a forward of ATen operators, partitioned already: a backward that drew again would differ.
    """
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        if _draws_in_order(node):
            _split(graph, node)


def _draws_in_order(dropout: fx.Node) -> bool:
    source: Any = dropout.args[0]
    value, rate, train = source.meta["val"], *dropout.args[1:]
    if value.device.type != "cpu" or any(isinstance(size, int) and size == 0 for size in value.shape):
        return False  # the mask of nothing has another dtype
    return value.is_contiguous() and isinstance(rate, float) and train is True


def _split(graph: fx.Graph, dropout: fx.Node) -> None:
    source: Any
    rate: Any
    source, rate, _ = dropout.args
    kept = 1 - rate
    scale = torch.ones((), dtype=source.meta["val"].dtype).div(kept).item() if kept else 0.0
    with graph.inserting_before(dropout):
        place = graph.call_function(
            aten.empty.memory_format, (_sizes(graph, source),), {"dtype": torch.bool, "device": "cpu"}
        )
        mask = graph.call_function(aten.bernoulli.p, (place, kept))
        product = graph.call_function(aten.mul.Tensor, (source, mask))
        scaled = graph.call_function(aten.mul.Tensor, (product, scale))
    for nodes, value in zip(((product, scaled), (place, mask)), dropout.meta["val"], strict=True):
        for node in nodes:
            node.meta["val"] = value
    for output in list(dropout.users):
        index: Any = output.args[1]
        output.replace_all_uses_with((scaled, mask)[index])
        graph.erase_node(output)
    graph.erase_node(dropout)


def _sizes(graph: fx.Graph, source: fx.Node) -> list[Any]:
    """The sizes of a tensor; those that change are asked of it."""
    sizes = enumerate(source.meta["val"].shape)
    return [
        size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (source, i))
        for i, size in sizes
    ]
