"""Drop the gradients of frozen parameters."""

from collections.abc import Set

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.contract import graph_pass


@graph_pass
def drop_gradients(joint: JointGraph, keep: Set[str]) -> None:
    """Set every gradient slot to None whose input is not in `keep`.

    Before: `return (loss, dw1, dw2)`
    After, with `keep={"w2"}`: `return (loss, None, dw2)`

    Sound because a slot that is None tells autograd that the input has no gradient, exactly as
    `requires_grad=False` would. The nodes that computed the slot stay, for `eliminate_dead_nodes`.

    Args:
        joint: the graph.
        keep: names of the inputs whose gradients stay; a name that is no slot changes nothing.
    """
    gradients = tuple(
        gradient if slot in keep else None
        for slot, gradient in zip(joint.slots, joint.gradients, strict=True)
    )
    joint.graph.output_node().args = (joint.outputs[: joint.forward_outputs] + gradients,)
