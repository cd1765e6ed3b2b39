"""Checks for errors in a backward, and the effect tokens that keep them in order.

AOTAutograd threads a token through the operators of a backward that check for errors, as those of
`torch.linalg` do, and returns the token after the gradients.
"""

from collections.abc import Set
from operator import getitem
from typing import Any

import torch
from torch import fx

from gtcompile.graph.joint_graph import JointGraph, ancestors
from gtcompile.passes.contract import graph_pass
from gtcompile.torch_internals import BackwardTokenAOTOutput, with_effects

aten = torch.ops.aten

EFFECTS = "effect tokens"
"""Name of the gradient slots that hold effect tokens."""


@graph_pass
def drop_unneeded_checks(joint: JointGraph, keep: Set[str]) -> None:
    """Check nothing that only gradients outside of `keep` need.

    Before: `x, info = solve(a, dy); token = with_effects(t, check, info); return (loss, x, db, token)`
    After, with `keep={"b"}`: `token = with_effects(t, check, zeros)` and the rest unchanged: `solve` is dead
    once the gradient `x` is dropped

    Sound because zeros report no error, and eager PyTorch does not check what it does not compute. The token
    itself stays, because AOTAutograd expects it.
    """
    pairs = zip(joint.slots, joint.gradients, strict=True)
    forward = joint.outputs[: joint.forward_outputs]
    needed = ancestors(n for n in (*forward, *(g for slot, g in pairs if slot in keep)) if n is not None)
    for node in joint.graph.find_nodes(op="call_function", target=with_effects):
        _token, operator, info = node.args[:3]
        if operator is aten._linalg_check_errors.default and needed.isdisjoint(_sources(info)):
            node.replace_input_with(info, _zeros(joint.graph, node, info))


@graph_pass
def drop_effect_tokens(module: fx.GraphModule) -> None:
    """Set every effect token among the outputs of a graph to None, and remove the checks, now dead.

    Before: `return (loss, x, db, token)`
    After:  `return (loss, x, db, None)`

    Sound because a check changes no value. Where a matrix turns out to be singular, the gradient is infinite
    or NaN, without an error.
    """
    output = module.graph.output_node()
    outputs: Any = output.args[0]
    meanings = zip(outputs, output.meta["desc"], strict=True)
    output.args = (
        tuple(None if isinstance(desc, BackwardTokenAOTOutput) else node for node, desc in meanings),
    )
    module.graph.eliminate_dead_code()


def _sources(info: fx.Node) -> set[fx.Node]:
    """An operand of a check, and the operator of several outputs that it is one of."""
    return {info, *(info.all_input_nodes if info.target is getitem else ())}


def _zeros(graph: fx.Graph, before: fx.Node, like: fx.Node) -> fx.Node:
    value = like.meta["val"]
    with graph.inserting_before(before):
        constant = graph.call_function(
            aten.full.default, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device}
        )
    constant.meta["val"] = value
    return constant
