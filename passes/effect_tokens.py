"""Remove unneeded error checks from a backward, and the effect tokens that order them.

Some operators check for errors, such as those of `torch.linalg`. AOTAutograd threads a token through these
checks, to keep their order, and returns the token after the gradients.
"""

from collections.abc import Set
from operator import getitem
from typing import Any

import torch
from torch import fx

from gtcompile.graph.joint_graph import JointGraph, ancestors
from gtcompile.passes.contract import graph_pass
from gtcompile.passes.zero_tangents import read_constant_zero
from gtcompile.torch_internals import BackwardTokenAOTOutput, with_effects

aten = torch.ops.aten

EFFECTS = "effect tokens"
"""Name of the gradient slots that hold effect tokens."""


@graph_pass
def drop_unneeded_checks(joint: JointGraph, keep: Set[str]) -> None:
    """Disable the error checks of operators that only gradients outside `keep` depend on.

    Before: `x, info = solve(a, dy); token = with_effects(t, check, info); return (loss, x, db, token)`
    After, with `keep={"b"}`: `token = with_effects(t, check, zeros)` and the rest unchanged: `solve` is dead
    once the gradient `x` is dropped

    Sound because zeros report no error, and eager PyTorch does not run these operators at all. The token
    stays, because AOTAutograd expects it. A check of a value with symbolic shape also stays.
    """
    pairs = zip(joint.slots, joint.gradients, strict=True)
    forward = joint.outputs[: joint.forward_outputs]
    needed = ancestors(n for n in (*forward, *(g for slot, g in pairs if slot in keep)) if n is not None)
    for node in joint.graph.find_nodes(op="call_function", target=with_effects):
        _token, operator, info = node.args[:3]
        if operator is aten._linalg_check_errors.default and needed.isdisjoint(_sources(info)):
            read_constant_zero(node, info)


@graph_pass
def drop_effect_tokens(module: fx.GraphModule) -> None:
    """Set all effect tokens among the outputs to None, and remove the checks, which are dead then.

    Before: `return (loss, x, db, token)`
    After:  `return (loss, x, db, None)`

    Sound because a check changes no value. For a singular matrix, the gradient becomes infinite or NaN
    without an error.
    """
    output = module.graph.output_node()
    outputs: Any = output.args[0]
    meanings = zip(outputs, output.meta["desc"], strict=True)
    output.args = (
        tuple(None if isinstance(desc, BackwardTokenAOTOutput) else node for node, desc in meanings),
    )
    module.graph.eliminate_dead_code()


def _sources(info: fx.Node) -> set[fx.Node]:
    """Return an operand of a check, and the operator whose output it is."""
    return {info, *(info.all_input_nodes if info.target is getitem else ())}
