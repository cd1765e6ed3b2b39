"""The pipeline of passes that restricts a joint graph to a trained set."""

from collections.abc import Set

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.passes.output_masks import narrow_output_masks


def restrict_gradients(joint: JointGraph, keep: Set[str]) -> JointGraph:
    """Return a joint graph that computes the gradients of `keep`, and no node that only others need.

    Args:
        joint: the captured graph. It does not change.
        keep: names of the inputs whose gradients stay. Names without a gradient are ignored.
    """
    joint = drop_gradients(joint, keep)
    joint = eliminate_dead_nodes(joint)
    return narrow_output_masks(joint)
