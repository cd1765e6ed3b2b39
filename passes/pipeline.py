"""The passes in order: from everything a joint graph can compute to what a trained set needs."""

from collections.abc import Set

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.passes.output_masks import narrow_output_masks


def restrict_gradients(joint: JointGraph, keep: Set[str]) -> JointGraph:
    """Return the joint graph that computes the gradients of `keep`, and nothing that only others needed.

    Args:
        joint: stays unchanged.
        keep: names of the inputs whose gradients stay; a name without a gradient changes nothing.
    """
    joint = drop_gradients(joint, keep)
    joint = eliminate_dead_nodes(joint)
    return narrow_output_masks(joint)
