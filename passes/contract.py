"""The interface of all passes in this package, and the contract that their decorators check.

A pass takes a `JointGraph` (forward and backward, with named gradient slots), or an `fx.GraphModule`: a
backward graph after partitioning, or the forward graph that Dynamo captured. Both have `.graph`.

* `@graph_pass`: a rewrite. The function edits a copy in place, in ordinary FX style. Callers pass a graph and
  receive a new one of the same type; theirs does not change. The annotation of a pass that needs slot names
  says `JointGraph`.
* `@interface_pass("inputs" | "outputs" | "names")`: a rewrite that changes the calling convention. It
  declares which part; the rest of the contract is checked.
* `@graph_split`: splits a backward graph into several graphs that together compute the same gradients.

Backward graphs have no type of their own, because it would wrap a module and add nothing. Passes are not
classes with `requires` and `ensures`, as in onnx/ir-py, because none needs conditions beyond this contract.
Inductor calls one pass in place on its own graph (`onednn_products.py`).
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar

from torch import fx

from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import JointGraph, copy_module, returns_something, verify

logger = logging.getLogger(__name__)
Interface = Literal["inputs", "outputs", "names"]
"""The parts of a graph's calling convention that a pass may change."""


class Parts(Protocol):
    """The result of a split."""

    @property
    def modules(self) -> Sequence[fx.GraphModule]:
        """The graphs of all parts. Nodes keep their names."""

    @property
    def finished(self) -> Sequence[int]:
        """Positions, among the outputs of the given graph, of the outputs that the parts compute."""


G = TypeVar("G", bound="JointGraph | fx.GraphModule")
S = TypeVar("S", bound=Parts)
P = ParamSpec("P")


def graph_pass(edit: Callable[Concatenate[G, P], None]) -> Callable[Concatenate[G, P], G]:
    """Turn an in-place edit into a function from a graph to a new graph of the same type.

    Contract: the given graph does not change. The result has the same inputs and the same number of outputs.
    Outputs that were None stay None. No call loses its `meta["val"]`, and no call without one is added. A
    joint graph keeps its forward outputs, and its provenance gains the pass. The result is linted and
    recompiled.

    Raises:
        GraphContractError: the edit violates the contract.
    """
    return interface_pass()(edit)


def interface_pass(
    *changes: Interface,
) -> Callable[[Callable[Concatenate[G, P], None]], Callable[Concatenate[G, P], G]]:
    """Decorate a pass that changes the calling convention; otherwise the contract is that of `graph_pass`.

    Args:
        *changes: "inputs": adds or removes inputs. "outputs": removes outputs, or replaces them by other
            nodes. "names": renames inputs, in the same order.

    Raises:
        GraphContractError: the edit violates the rest of the contract.
    """

    def decorate(edit: Callable[Concatenate[G, P], None]) -> Callable[Concatenate[G, P], G]:
        name = edit.__name__

        @functools.wraps(edit)
        def run(given: G, /, *args: P.args, **kwargs: P.kwargs) -> G:
            _verify(given)
            result = _copy(given, name)
            edit(result, *args, **kwargs)
            _verify(result)
            _check_graph(name, given.graph, result.graph)
            _check_interface(name, given.graph, result.graph, changes)
            if isinstance(given, JointGraph) and isinstance(result, JointGraph):
                _check_joint(name, given, result)
            (result.module if isinstance(result, JointGraph) else result).recompile()
            logger.debug("%s: %d -> %d nodes", name, len(given.graph.nodes), len(result.graph.nodes))
            return result

        return run

    return decorate


def graph_split(
    split: Callable[Concatenate[fx.GraphModule, P], S],
) -> Callable[Concatenate[fx.GraphModule, P], S]:
    """Check the result of a function that splits a backward graph into parts.

    Contract: the given graph does not change. Every call in a part exists in the given graph, and in no other
    part; no call loses its `meta["val"]`. No output is computed by two parts.

    Raises:
        GraphContractError: the split violates the contract.
    """
    name = split.__name__

    @functools.wraps(split)
    def run(given: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> S:
        before = _signatures(given.graph)
        parts = split(given, *args, **kwargs)
        if _signatures(given.graph) != before:
            raise GraphContractError(f"{name} changed the graph it was given")
        for module in parts.modules:
            _check_graph(name, given.graph, module.graph)
        calls = Counter(node.name for module in parts.modules for node in _calls(module.graph))
        _refuse(
            calls.keys() - {node.name for node in given.graph.nodes},
            f"{name} created calls that the given graph lacks:",
        )
        _refuse({call for call, times in calls.items() if times > 1}, f"{name} repeats in several parts:")
        twice = {slot for slot, times in Counter(parts.finished).items() if times > 1}
        _refuse(map(str, twice), f"{name} computes twice the outputs:")
        logger.debug("%s: %d nodes -> %d parts", name, len(given.graph.nodes), len(parts.modules))
        return parts

    return run


def _verify(given: JointGraph | fx.GraphModule) -> None:
    if isinstance(given, JointGraph):
        verify(given)


def _copy(given: G, name: str) -> G:
    if isinstance(given, JointGraph):
        return dataclasses.replace(  # type: ignore[return-value]
            given.copy(), provenance=(*given.provenance, name)
        )
    return copy_module(given)  # type: ignore[return-value]


def _check_graph(name: str, before: fx.Graph, after: fx.Graph) -> None:
    """Check that a graph is well formed, and that no call lost its value or was added without one."""
    after.lint()
    known = {node.name for node in _calls(before) if not _has_value(node)}
    _refuse(
        {n.name for n in _calls(after) if not _has_value(n)} - known,
        f"{name} left calls without meta['val']:",
    )


def _check_interface(name: str, before: fx.Graph, after: fx.Graph, changes: Sequence[Interface]) -> None:
    inputs = [graph.find_nodes(op="placeholder") for graph in (before, after)]
    names = [[node.name for node in nodes] for nodes in inputs]
    if "names" in changes and len(inputs[0]) == len(inputs[1]):
        names = [[str(node.meta.get("desc")) for node in nodes] for nodes in inputs]
    if names[0] != names[1] and "inputs" not in changes:
        raise GraphContractError(f"{name} changed the inputs of the graph: {names[0]} became {names[1]}")
    outputs = [_outputs(graph) for graph in (before, after)]
    if "outputs" in changes:
        if len(outputs[1]) > len(outputs[0]):
            raise GraphContractError(f"{name} added outputs: {len(outputs[0])} became {len(outputs[1])}")
        return
    if len(outputs[0]) != len(outputs[1]):
        raise GraphContractError(f"{name} made {len(outputs[1])} outputs of {len(outputs[0])}")
    invented = [i for i, (old, new) in enumerate(zip(*outputs, strict=True)) if old is None is not new]
    _refuse(map(str, invented), f"{name} fills outputs that were None:")


def _check_joint(name: str, before: JointGraph, after: JointGraph) -> None:
    forward = [
        [node and node.name for node in joint.outputs[: joint.forward_outputs]] for joint in (before, after)
    ]
    if forward[0] != forward[1]:
        raise GraphContractError(f"{name} changed the forward outputs: {forward[0]} became {forward[1]}")


def _refuse(wrong: object, what: str) -> None:
    names = sorted(wrong)  # type: ignore[call-overload]
    if names:
        raise GraphContractError(f"{what} {', '.join(names[:5])}")


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op.startswith("call_")]


def _has_value(node: fx.Node) -> bool:
    """Whether a call has an example of its result; Dynamo's graphs store it as `example_value`."""
    return "val" in node.meta or "example_value" in node.meta or not returns_something(node)


def _outputs(graph: fx.Graph) -> Sequence[fx.Node | None]:
    outputs = graph.output_node().args[0]
    return outputs if isinstance(outputs, (list, tuple)) else (outputs,)  # type: ignore[return-value]


def _signatures(graph: fx.Graph) -> list[tuple[object, ...]]:
    """Return a comparable description of each node. Equal graphs have equal lists."""
    return [(node.name, node.target, node.args, node.kwargs) for node in graph.nodes]
