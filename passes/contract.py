"""What every pass guarantees, enforced by the code that runs it."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, cast

from torch import fx

from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import JointGraph, verify

logger = logging.getLogger(__name__)
P = ParamSpec("P")


def graph_pass(
    edit: Callable[Concatenate[fx.Graph, JointGraph, P], None],
) -> Callable[Concatenate[JointGraph, P], JointGraph]:
    """Turn an in-place edit of an FX graph into a function from `JointGraph` to `JointGraph`.

    Contract: the graph given is not changed; the result has the same placeholders, the same number of
    outputs, the same forward outputs, no gradient that was not there before, and no name used twice. The
    result is linted and recompiled, its provenance extended.

    Raises:
        GraphContractError: when the edit breaks the contract.
    """
    name = edit.__name__

    @functools.wraps(edit)
    def run(joint: JointGraph, *args: P.args, **kwargs: P.kwargs) -> JointGraph:
        verify(joint)
        result = dataclasses.replace(joint.copy(), provenance=(*joint.provenance, name))
        graph = result.module.graph
        edit(graph, result, *args, **kwargs)
        graph.lint()
        verify(result)
        _compare(name, joint, result)
        result.module.recompile()
        before, after = len(joint.module.graph.nodes), len(graph.nodes)
        logger.debug("%s: %d -> %d nodes, %d gradients", name, before, after, len(result.live))
        return result

    return cast("Callable[Concatenate[JointGraph, P], JointGraph]", run)


def _compare(name: str, before: JointGraph, after: JointGraph) -> None:
    inputs = [
        [node.name for node in joint.module.graph.find_nodes(op="placeholder")] for joint in (before, after)
    ]
    if inputs[0] != inputs[1]:
        raise GraphContractError(f"{name} changed the inputs of the graph")
    forward = [
        [node and node.name for node in joint.outputs[: joint.forward_outputs]] for joint in (before, after)
    ]
    if forward[0] != forward[1]:
        raise GraphContractError(f"{name} changed the forward outputs: {forward[0]} became {forward[1]}")
    invented = after.live - before.live
    if invented:
        raise GraphContractError(f"{name} made gradients nobody had: {sorted(invented)}")
