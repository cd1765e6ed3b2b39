"""Outputs of a region that nobody differentiates, and whether zero gradients for them cost anything.

AOTAutograd's backward takes a gradient for every output, zeros where nothing was differentiated through it:
the zeros of a state that a block hands on for nothing run back through matrix products. Which outputs are
differentiated shows in the first backward only.
"""

import logging
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from gtcompile.compiler.region_graph import DifferentiableFlow, Histories, gradient_positions, region_node
from gtcompile.graph.flop_registry import register_missing_formulas

logger = logging.getLogger(__name__)


class UnusedOutputs:
    """Learns from the first backward of a region whether it sends zeros through products of matrices.

    Args:
        graph: of the region, as Dynamo captured it.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        outputs: Any = graph.graph.output_node().args[0]
        self.unknown = len(outputs) > 1
        """Whether no backward has run yet that could show it."""
        self.costly = False
        """Whether zeros for outputs that nobody differentiates cost FLOPs."""

    def watch(self, outputs: Sequence[Any], before: Histories) -> None:
        """Learn from the backward of this call.

        Args:
            outputs: of the call.
            before: the histories of its inputs before the call.
        """
        node = region_node(outputs, before)
        if node is None:
            return
        positions = gradient_positions(outputs, node)

        def note(gradients: Sequence[torch.Tensor | None]) -> None:
            if self.unknown:
                self.unknown = False
                used = {i for i, position in positions.items() if gradients[position] is not None}
                self.costly = costs_flops_beside(self._graph, used)

        node.register_prehook(note)


def costs_flops_beside(graph: fx.GraphModule, differentiated: Set[int]) -> bool:
    """Whether zero gradients of the other outputs would run back through matrix products.

    Args:
        graph: as Dynamo captured it, with an `example_value` at every node.
        differentiated: positions of the outputs for which a backward has gradients.
    """
    outputs: Any = graph.graph.output_node().args[0]
    flow = DifferentiableFlow(graph.graph)
    used = flow.ancestors(outputs[i] for i in differentiated)
    unused = flow.ancestors(node for node in outputs if isinstance(node, fx.Node)) - used
    register_missing_formulas()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            for node in (n for n in graph.graph.nodes if n in unused and n.op.startswith("call_")):
                _call(graph, node)
    except Exception as error:  # an operator that cannot be called by itself may cost something
        logger.info("unused outputs of a region need %s, of unknown cost: %s", node.target, error)
        return True
    return counter.get_total_flops() > 0


def _call(graph: fx.GraphModule, node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
    if node.op == "call_method":
        getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif callable(node.target):
        node.target(*args, **kwargs)
    else:
        graph.get_submodule(str(node.target))(*args, **kwargs)
