"""Graphs that run operator by operator, without generated kernels.

An `OperatorProgram` is a backward graph as a list of operator calls, any part of which can run.

The block in which the backward ends needs another part of its backward for almost every trained set. For a
transformer block of 71 nodes, choosing among calls that were prepared once takes 0.05 ms, and making an FX
graph of the part 3 ms; `fx.Interpreter` then takes twice as long to run it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem, or_
from typing import Any

import torch
from torch import fx

from gtcompile.graph.flops import output_flops, planning_flops
from gtcompile.passes.free_strides import free_strides
from gtcompile.passes.output_masks import MASKED_OPERATORS
from gtcompile.passes.writable_outputs import keep_outputs_writable
from gtcompile.torch_internals import BOXED_CALL, BoxedCodeGen

aten = torch.ops.aten


def _converted(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype, copy=True)


FUNCTIONS: Mapping[object, Callable[..., Any]] = {
    aten.view.default: torch.reshape,  # a value may have other strides at run time than in the trace
    aten.reshape.default: torch.reshape,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.permute.default: torch.permute,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.sum.dim_IntList: torch.sum,
    torch.ops.prims.convert_element_type.default: _converted,
}
"""Functions that do the same as an operator, and are called faster because they parse their arguments in C.
The operator that converts types, frequent in bfloat16, is slowest: all of it is written in Python."""
Boxed = Callable[[list[Any]], Sequence[Any]]
"""A function from a list of inputs, which it empties, to outputs."""
Values = list[Any]
"""One value per node of the graph, in the graph's order; None before it is computed and after its last
use."""
NodeSet = int
"""A set of nodes, one bit per position in the graph: graphs of whole models have thousands of nodes."""
Call = Callable[..., Any]
"""Computes one node from the values so far; for a masked operator, only the outputs in `read`."""
Filler = Callable[[Values], Any]
"""Makes an operator's arguments from the values so far."""


def boxed(function: Boxed) -> Boxed:
    """Mark a function as one that takes a list and empties it, as AOTAutograd expects."""

    def call(inputs: list[Any]) -> Sequence[Any]:
        return function(inputs)

    setattr(call, BOXED_CALL, True)
    return call


def run_operators(module: fx.GraphModule, example_inputs: object = None) -> Boxed:
    """Make the graph a function that frees every value after its last use.

    Views may become copies: at run time some operators return other strides than when they were traced.

    Args:
        module: changed, and owned by the result from now on.
        example_inputs: not used; AOTAutograd passes them to every compiler.
    """
    module = free_strides(keep_outputs_writable(module))
    module.graph.set_codegen(BoxedCodeGen())
    module.recompile()
    return boxed(module.forward)


@dataclass(frozen=True, slots=True)
class Step:
    """One operator call of a program."""

    position: int
    """Position of its result among the values."""
    call: Call
    """Calls the operator on its arguments."""
    reads: tuple[int, ...]
    """Positions of its operands among the values."""
    masked: Mapping[int, int] | None
    """For an operator with an output mask: from the position of each node that picks an output to the index
    of the output. None if there is no mask, or the tuple of outputs itself is read."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The part of a program that some outputs need."""

    inputs: tuple[int, ...]
    """Positions, among the graph's inputs, of those that are read."""
    run: Boxed
    """Takes those inputs and returns all outputs of the graph, None for those that were not requested."""


class OperatorProgram:
    """A graph's operator calls, and what each of its outputs needs.

    Args:
        graph: without side effects; not changed. Views become copies where the strides of a result require
        it.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        nodes = list(graph.graph.nodes)
        self._positions = {node: position for position, node in enumerate(nodes)}
        outputs: Any = graph.graph.output_node().args[0]
        self._outputs = tuple(None if node is None else self._positions[node] for node in outputs)
        self._inputs = [self._positions[node] for node in graph.graph.find_nodes(op="placeholder")]
        self._constants = {self._positions[n]: _constant(graph, n) for n in nodes if n.op == "get_attr"}
        self._steps = [self._step(node) for node in nodes if node.op == "call_function"]
        self._needs = self._reach()
        self._flops = self._count_flops(nodes)

    def excerpt(self, outputs: Iterable[int]) -> Excerpt:
        """Select the part that computes some of the outputs.

        Args:
            outputs: positions of the outputs; an output that is None in the graph stays None.
        """
        wanted = {i: self._outputs[i] for i in outputs}
        kept = {i: position for i, position in wanted.items() if position is not None}
        needed = self._needed(kept)
        calls = tuple(self._calls(kept, needed))
        positions = tuple(i for i, position in enumerate(self._inputs) if needed >> position & 1)
        results = tuple(kept.get(i) for i in range(len(self._outputs)))
        run = functools.partial(_run, self._empty, [self._inputs[i] for i in positions], calls, results)
        return Excerpt(positions, run)

    def flops(self, outputs: Iterable[int]) -> int:
        """FLOPs of the part that computes some of the outputs, given by their positions."""
        needed = self._needed(outputs)
        return sum(flops for position, flops in self._flops.items() if needed >> position & 1)

    def _needed(self, outputs: Iterable[int]) -> NodeSet:
        """The nodes that some outputs are computed from."""
        positions = (self._outputs[i] for i in outputs)
        return functools.reduce(or_, (self._needs[p] for p in positions if p is not None), 0)

    def _empty(self) -> Values:
        values: Values = [None] * len(self._positions)
        for position, constant in self._constants.items():
            values[position] = constant
        return values

    def _calls(self, kept: Mapping[int, int], needed: NodeSet) -> list[tuple[int, Call, list[int]]]:
        """The calls, each with the positions of the values that no later call reads."""
        alive = set(kept.values())
        calls = []
        for step in reversed(self._steps):
            if needed >> step.position & 1:
                last = [position for position in dict.fromkeys(step.reads) if position not in alive]
                alive.update(last)
                calls.append((step.position, _narrowed(step, needed), last))
        return calls[::-1]

    def _reach(self) -> dict[int, NodeSet]:
        """Per position of an output, the nodes that it is computed from."""
        reach = {position: 1 << position for position in range(len(self._positions))}
        for step in self._steps:
            reach[step.position] |= functools.reduce(or_, (reach[position] for position in step.reads), 0)
        return {position: reach[position] for position in self._outputs if position is not None}

    def _count_flops(self, nodes: Iterable[fx.Node]) -> dict[int, int]:
        """FLOPs by position of node; those of a convolution's backward are counted at its outputs."""
        work: dict[int, int] = {}
        for node in (node for node in nodes if node.op == "call_function"):
            if by_output := output_flops(node):
                picked: Any = ((user, user.args[1]) for user in node.users)
                work |= {self._positions[user]: by_output.get(index, 0) for user, index in picked}
            elif flops := planning_flops(node):
                work[self._positions[node]] = flops
        return work

    def _step(self, node: fx.Node) -> Step:
        target: Any = FUNCTIONS.get(node.target, node.target)
        reads = tuple(self._positions[source] for source in node.all_input_nodes)
        call = _caller(target, _filler(node.args, self._positions), _filler(node.kwargs, self._positions))
        masked = self._picks(node) if node.target in MASKED_OPERATORS else None
        return Step(self._positions[node], call, reads, masked)

    def _picks(self, node: fx.Node) -> dict[int, int] | None:
        picks: dict[int, int] = {}
        for user in node.users:
            if user.target is not getitem:
                return None
            picks[self._positions[user]] = user.args[1]  # type: ignore[assignment]
        return picks


def _run(
    empty: Callable[[], Values],
    positions: Sequence[int],
    calls: Sequence[tuple[int, Call, Sequence[int]]],
    results: Sequence[int | None],
    inputs: list[Any],
) -> Sequence[Any]:
    """Run the calls on the inputs; free every input and value after its last use."""
    values = empty()
    for position in reversed(positions):
        values[position] = inputs.pop()
    for position, call, last in calls:
        values[position] = call(values)
        for dead in last:
            values[dead] = None
    return tuple(None if position is None else values[position] for position in results)


def _constant(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _narrowed(step: Step, needed: NodeSet) -> Call:
    """The call, computing only those outputs of its operator that are read."""
    if step.masked is None:
        return step.call
    read = {index for position, index in step.masked.items() if needed >> position & 1}
    return functools.partial(step.call, read=read)


def _caller(target: Callable[..., Any], arguments: Filler, keywords: Filler) -> Call:
    if target in MASKED_OPERATORS:

        def masked(values: Values, read: set[int] | None = None) -> Any:
            *others, mask = arguments(values)
            if read is not None:
                mask = [bool(wanted) and index in read for index, wanted in enumerate(mask)]
            return target(*others, mask, **keywords(values))

        return masked
    return lambda values: target(*arguments(values), **keywords(values))


def _filler(template: Any, positions: Mapping[fx.Node, int]) -> Filler:
    """Make a function that puts values where a template has nodes."""
    if isinstance(template, fx.Node):
        position = positions[template]
        return lambda values: values[position]
    if isinstance(template, dict):
        named = {name: _filler(part, positions) for name, part in template.items()}
        return lambda values: {name: fill(values) for name, fill in named.items()}
    if isinstance(template, slice):
        ends = [_filler(end, positions) for end in (template.start, template.stop, template.step)]
        return lambda values: slice(*(fill(values) for fill in ends))
    if isinstance(template, (tuple, list)) and _has_nodes(template):
        parts = [_filler(part, positions) for part in template]
        if isinstance(template, tuple):
            return lambda values: tuple(fill(values) for fill in parts)
        return lambda values: [fill(values) for fill in parts]
    return lambda values: template


def _has_nodes(template: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(template, found.append)
    return bool(found)
