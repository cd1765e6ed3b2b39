"""Drop the gradients of frozen parameters."""

from collections.abc import Set

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.contract import graph_pass


@graph_pass
def drop_gradients(joint: JointGraph, keep: Set[str]) -> None:
    """Set the gradient slots of all inputs outside `keep` to None.

    Before: `return (loss, dw1, dw2)`
    After, with `keep={"w2"}`: `return (loss, None, dw2)`

    Sound because a None slot means to autograd that the input has no gradient, as with
    `requires_grad=False`. The nodes that computed the slot are left to `eliminate_dead_nodes`.

    Args:
        joint: the graph.
        keep: names of the inputs whose gradients stay. Names without a slot are ignored.
    """
    gradients = tuple(
        gradient if slot in keep else None
        for slot, gradient in zip(joint.slots, joint.gradients, strict=True)
    )
    joint.graph.output_node().args = (joint.outputs[: joint.forward_outputs] + gradients,)
