"""What a forward computes only for outputs that nobody differentiates."""

import logging
from collections.abc import Set
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from gtcompile.compiler.region_graph import possible_writers
from gtcompile.graph.flops import register_missing_formulas
from gtcompile.graph.joint_graph import ancestors

logger = logging.getLogger(__name__)


def has_side_work(graph: fx.GraphModule, differentiated: Set[int]) -> bool:
    """Whether zero gradients of the other outputs would run back through products of matrices.

    Args:
        graph: as Dynamo captured it, with an `example_value` at every node.
        differentiated: positions of the outputs that a backward has gradients for.
    """
    outputs: Any = graph.graph.output_node().args[0]
    writers = possible_writers(graph.graph)
    wanted = ancestors([outputs[i] for i in differentiated], writers)
    side = ancestors([node for node in outputs if _asks(node)], writers) - wanted
    calls = [node for node in graph.graph.nodes if node in side and node.op.startswith("call_")]
    register_missing_formulas()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            for node in calls:
                _call(graph, node)
    except Exception as error:  # whatever cannot be run by itself may be work
        logger.info("beside what is differentiated a region calls %s: %s", node.target, error)
        return True
    return counter.get_total_flops() > 0


def _asks(node: Any) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.requires_grad


def _call(graph: fx.GraphModule, node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
    if node.op == "call_method":
        getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif callable(node.target):
        node.target(*args, **kwargs)
    else:
        graph.get_submodule(str(node.target))(*args, **kwargs)
