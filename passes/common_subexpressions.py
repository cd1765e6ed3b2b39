"""Merge nodes that compute the same value from the same inputs."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from gtcompile.graph.joint_graph import ancestors, count_forward_outputs
from gtcompile.passes.contract import graph_pass
from gtcompile.torch_internals import merge_equal_nodes


@graph_pass
def eliminate_common_subexpressions(module: fx.GraphModule) -> None:
    """Keep only one of several nodes with equal operator and arguments, as torch's partitioner does.

    Before: `a = sin(x); b = sin(x); return (a, mul(b, dy))`
    After:  `a = sin(x); return (a, mul(a, dy))`

    Sound because operators are deterministic, except those that draw random numbers or write to memory, which
    are not merged. torch's partitioner does the same when a model is compiled as a whole, so without this
    pass costs would count work that does not run.

    Args:
        module: a joint graph with AOTAutograd's descriptors.
    """
    output = module.graph.output_node()
    outputs: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    gradients = outputs[count_forward_outputs(output.meta["desc"]) :]
    backward = ancestors([node for node in gradients if isinstance(node, fx.Node)])
    module.graph = merge_equal_nodes(module.graph, backward)
