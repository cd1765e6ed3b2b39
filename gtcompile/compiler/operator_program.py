"""A backward graph as a list of operator calls, of which any part can be run without another graph.

The block in which the backward ends needs another part of its backward for almost every trained set. Making
an FX graph of that part, and Python code of the graph, takes milliseconds; choosing among calls that were
prepared once takes microseconds.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem, or_
from typing import Any

import torch
from torch import fx

from gtcompile.compiler.operators import Boxed
from gtcompile.passes.output_masks import MASKED_OPERATORS

aten = torch.ops.aten
Values = list[Any]
"""One place per node of the graph, in the graph's order."""
Places = int
"""A set of places, one bit each: graphs of whole models have thousands of nodes."""
Call = Callable[..., Any]
"""Computes one node from the values so far; of a masked operator, only the outputs in `read`."""
Filler = Callable[[Values], Any]
"""Makes an operator's arguments from the values so far."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operator call of a program."""

    place: int
    """Of its result among the values."""
    call: Call
    """The operator on its arguments."""
    reads: tuple[int, ...]
    """Places of its operands."""
    masked: Mapping[int, int] | None
    """Of an operator with an output mask: from places of the nodes that pick an output to its index; None
    where the tuple itself is read, or there is no mask."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What some outputs need of a program."""

    inputs: tuple[int, ...]
    """Positions among the graph's inputs of those that are read."""
    run: Boxed
    """From those inputs to all outputs of the graph, None where not asked for."""


class Program:
    """A graph's operator calls, and what each of its outputs needs.

    Args:
        graph: without side effects; left as it is. Views may become copies where strides ask for it.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        nodes = list(graph.graph.nodes)
        self._places = {node: place for place, node in enumerate(nodes)}
        outputs: Any = graph.graph.output_node().args[0]
        self._outputs = tuple(None if node is None else self._places[node] for node in outputs)
        self._inputs = [self._places[node] for node in graph.graph.find_nodes(op="placeholder")]
        self._constants = {self._places[n]: _constant(graph, n) for n in nodes if n.op == "get_attr"}
        self._steps = [self._step(node) for node in nodes if node.op == "call_function"]
        self._needs = self._reach()

    def excerpt(self, outputs: Iterable[int]) -> Excerpt:
        """The part that computes some of the outputs.

        Args:
            outputs: their positions; those that are None in the graph stay so.
        """
        wanted = {i: self._outputs[i] for i in outputs}
        kept = {i: place for i, place in wanted.items() if place is not None}
        needed = functools.reduce(or_, (self._needs[place] for place in kept.values()), 0)
        calls = tuple(self._frugal(kept, needed))
        positions = tuple(i for i, place in enumerate(self._inputs) if needed >> place & 1)
        results = tuple(kept.get(i) for i in range(len(self._outputs)))
        run = functools.partial(_run, self._empty, [self._inputs[i] for i in positions], calls, results)
        return Excerpt(positions, run)

    def _empty(self) -> Values:
        values: Values = [None] * len(self._places)
        for place, constant in self._constants.items():
            values[place] = constant
        return values

    def _frugal(self, kept: Mapping[int, int], needed: Places) -> list[tuple[int, Call, list[int]]]:
        """The calls, each with the places that no later call reads."""
        alive = set(kept.values())
        calls = []
        for step in reversed(self._steps):
            if needed >> step.place & 1:
                last = [place for place in dict.fromkeys(step.reads) if place not in alive]
                alive.update(last)
                calls.append((step.place, _narrowed(step, needed), last))
        return calls[::-1]

    def _reach(self) -> dict[int, Places]:
        """Per place of an output, the places of everything it is computed from."""
        reach = {place: 1 << place for place in range(len(self._places))}
        for step in self._steps:
            reach[step.place] |= functools.reduce(or_, (reach[place] for place in step.reads), 0)
        return {place: reach[place] for place in self._outputs if place is not None}

    def _step(self, node: fx.Node) -> Step:
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        reads = tuple(self._places[source] for source in node.all_input_nodes)
        call = _caller(target, _filler(node.args, self._places), _filler(node.kwargs, self._places))
        masked = self._picks(node) if node.target in MASKED_OPERATORS else None
        return Step(self._places[node], call, reads, masked)

    def _picks(self, node: fx.Node) -> dict[int, int] | None:
        picks: dict[int, int] = {}
        for user in node.users:
            if user.target is not getitem:
                return None
            picks[self._places[user]] = user.args[1]  # type: ignore[assignment]
        return picks


def _run(
    empty: Callable[[], Values],
    places: Sequence[int],
    calls: Sequence[tuple[int, Call, Sequence[int]]],
    results: Sequence[int | None],
    inputs: list[Any],
) -> Sequence[Any]:
    """Run the calls on the inputs, which are let go; every value goes after its last use."""
    values = empty()
    for place in reversed(places):
        values[place] = inputs.pop()
    for place, call, last in calls:
        values[place] = call(values)
        for dead in last:
            values[dead] = None
    return tuple(None if place is None else values[place] for place in results)


def _constant(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _narrowed(step: Step, needed: Places) -> Call:
    """The call, asked for the outputs that are read and no others."""
    if step.masked is None:
        return step.call
    read = {index for place, index in step.masked.items() if needed >> place & 1}
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


def _filler(template: Any, places: Mapping[fx.Node, int]) -> Filler:
    """A function that puts values where a template has nodes."""
    if isinstance(template, fx.Node):
        place = places[template]
        return lambda values: values[place]
    if isinstance(template, dict):
        named = {name: _filler(part, places) for name, part in template.items()}
        return lambda values: {name: fill(values) for name, fill in named.items()}
    if isinstance(template, slice):
        ends = [_filler(end, places) for end in (template.start, template.stop, template.step)]
        return lambda values: slice(*(fill(values) for fill in ends))
    if isinstance(template, (tuple, list)) and _has_nodes(template):
        parts = [_filler(part, places) for part in template]
        if isinstance(template, tuple):
            return lambda values: tuple(fill(values) for fill in parts)
        return lambda values: [fill(values) for fill in parts]
    return lambda values: template


def _has_nodes(template: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(template, found.append)
    return bool(found)
