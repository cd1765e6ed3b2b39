"""Drop the gradients that nobody asked for."""

from collections.abc import Set

from torch import fx

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.contract import graph_pass


@graph_pass
def drop_gradients(graph: fx.Graph, joint: JointGraph, keep: Set[str]) -> None:
    """Set every gradient slot to None whose input is not in `keep`.

    Before: `return (loss, dw1, dw2)`
    After, with `keep={"w2"}`: `return (loss, None, dw2)`

    Sound because a slot that is None tells autograd that the input has no gradient, exactly as
    `requires_grad=False` would. What computed the slot stays, dead, for `eliminate_dead_nodes`.
    """
    output = graph.output_node()
    gradients = tuple(
        gradient if slot in keep else None
        for slot, gradient in zip(joint.slots, joint.gradients, strict=True)
    )
    output.args = (joint.outputs[: joint.forward_outputs] + gradients,)
