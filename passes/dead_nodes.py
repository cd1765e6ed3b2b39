"""Eliminate what no output needs."""

from torch import fx

from gtcompile.graph.joint_graph import JointGraph, ancestors
from gtcompile.passes.contract import graph_pass


@graph_pass
def eliminate_dead_nodes(graph: fx.Graph, joint: JointGraph) -> None:
    """Erase every node that no output and no side effect depends on.

    Before: `dx = mm(dy, w); dw = mm(t(x), dy); return (loss, None, dx)`
    After:  `dx = mm(dy, w); return (loss, None, dx)`

    Sound because the rest neither reads nor observes the erased nodes: inputs stay, and so do random draws
    and mutations (`Node.is_impure`) with all they depend on. Outputs of a multi-output operator that nobody
    reads any more are left to `narrow_output_masks`.
    """
    output = graph.output_node()
    needed = ancestors([output, *(node for node in graph.nodes if node.is_impure())])
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
