"""Backward plans of a hoisted region: how it computes each set of live gradients.

Three strategies run a part of the backward graph. All compute exactly the live gradients; they differ in what
they need compiled, and in the extra work they do:

* *chain and leaves*: the chain of activation gradients, compiled once, then the leaves of the live gradients,
  one by one (`passes/hoisting.py`). Leaves are weight gradients, and gradients of further inputs, such as
  the encoder's output in a decoder. A new set compiles nothing, but the whole chain runs.
* *operator program*: the operators that the live gradients need, called one by one (`operator_program.py`).
  It compiles nothing and does no extra work.
* *compiled excerpt*: the same operators, compiled for this one set.

A *plan* is the cheapest strategy for one set. Where chain and leaves do no more work than the live gradients
need, they are the cheapest. Otherwise the backward ends inside this graph, as it does in one block of the
model. That block runs the operator program, or the compiled excerpt with `cut_chains="compile"` or where only
compiled code can run it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from gtcompile.compiler.captured_region import CapturedRegion
from gtcompile.compiler.inductor import InductorParts, run_part
from gtcompile.compiler.operator_program import FUNCTIONS, Boxed, OperatorProgram, Values
from gtcompile.compiler.partitioning import Partition, Slots
from gtcompile.compiler.region_graph import Live, input_name, pick
from gtcompile.passes.hoisting import (
    HoistedBackward,
    Leaf,
    Operand,
    Part,
    extract,
    hoist_weight_gradients,
)
from gtcompile.passes.output_masks import narrow_output_masks
from gtcompile.passes.split_convolutions import split_convolutions
from gtcompile.torch_internals import INDUCTOR_RANDOM

PLANS_KEPT = 256
"""Plans a region keeps; the least recently used is dropped. Making one again takes microseconds, or finds its
code in Inductor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options and names that all plans of a region share."""

    parts: InductorParts | None
    """How Inductor compiles parts of the backward; None where no code is generated."""
    parameters: frozenset[str]
    """Names of the region's inputs that are parameters."""
    inputs: frozenset[str]
    """Names of all of the region's inputs."""
    cut_chains: Literal["run", "compile"]
    """Whether an excerpt of a chain runs operator by operator or is compiled."""

    @classmethod
    def of(cls, region: CapturedRegion, parts: InductorParts | None) -> "PlanOptions":
        """Read the options off a region."""
        return cls(
            parts=parts,
            parameters=frozenset(map(input_name, region.parameters)),
            inputs=frozenset(map(input_name, range(len(region.example_inputs)))),
            cut_chains=region.options.cut_chains,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How one set of live gradients is computed."""

    released: frozenset[int]
    """Positions among the forward graph's outputs of the saved values that the backward will not read."""
    backward: Boxed
    """From the backward graph's inputs to one gradient or None per slot."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The backward of a region, split into chain and leaves, with the chain compiled."""

    activation: Slots
    """The slot of the activation gradient that the chain computes; empty if there is none."""
    hoisted: HoistedBackward
    """The chain and the leaves as graphs."""
    run: Boxed
    """The compiled chain."""
    flops: int
    """FLOPs of the chain."""
    calls: Mapping[frozenset[int], Callable[..., Any]]
    """The leaves as functions, by the slots that each serves."""


LeafCall = tuple[
    Callable[..., Any], Callable[[Values], Sequence[Any]], int | list[int | None] | None, list[int]
]
"""A leaf as a function; what picks its operands from the values; where its results go (None: not wanted); and
which values nothing reads after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProgram:
    """Chain and leaves for one set of live gradients, prepared so that calling them takes little time.

    While it runs, all values are in one list: a gradient per slot, the computed values, the saved operands.
    """

    inputs: tuple[int, ...]
    """Positions of the chain's inputs among the backward graph's inputs."""
    run: Boxed
    """The compiled chain."""
    slots: int
    """Number of gradient slots."""
    handed_on: int
    """Number of computed values that the leaves add to those of the chain."""
    gradients: tuple[tuple[int, int], ...]
    """For each live gradient that the chain computes, its slot and its position among the values."""
    saved: tuple[int, ...]
    """Positions among the backward graph's inputs of the saved values that leaves read."""
    calls: tuple[LeafCall, ...]
    """The leaves in order."""


class BackwardPlans:
    """The plans of a region, each made when it is first needed.

    The full backward graph of a region is known at its compilation. Smaller ones are made at run time, for
    backwards in which some tangents are zero because nothing was differentiated through their outputs.

    Args:
        partition: of the region.
        options: of the region.
    """

    def __init__(self, partition: Partition, options: PlanOptions) -> None:
        self._partition, self._options = partition, options
        self._full = BackwardGraph(partition, options)
        self._full.compile_ahead()
        self._graphs: dict[frozenset[int], BackwardGraph] = {frozenset(): self._full}
        """By zero tangents, the graph to run; the full one where leaving them out saves no FLOPs."""
        self._plan = functools.lru_cache(PLANS_KEPT)(self._make_plan)
        """By live gradients and graph, the plan."""
        self.released = functools.lru_cache(PLANS_KEPT)(self._find_released)
        """By live gradients, what a forward may release; forgotten whenever there is another graph."""

    def _find_released(self, live: Live) -> frozenset[int]:
        """The saved values that a forward may release: those that no backward graph known so far would read.

        Args:
            live: positions of the region's inputs whose gradients are live.

        Returns:
            Positions among the forward graph's outputs.
        """
        plans = [self._plan(live, graph) for graph in set(self._graphs.values())]
        return frozenset.intersection(*(plan.released for plan in plans))

    def backward(self, live: Live, zero: frozenset[int], released: frozenset[int]) -> Boxed:
        """The backward of a call.

        Args:
            live: positions of the region's inputs whose gradients are live.
            zero: positions among the backward's inputs of the tangents that are zero.
            released: what the forward of the call released.
        """
        graph = self._graph(zero)
        plan = self._plan(live, graph)
        if not released <= plan.released:  # the forward ran before this combination of zeros was known
            plan = graph.least(self._live_slots(live))
        return plan.backward

    def _graph(self, zero: frozenset[int]) -> "BackwardGraph":
        if zero not in self._graphs:
            reduced = BackwardGraph(self._partition.without(zero), self._options)
            self._graphs[zero] = reduced if reduced.full_flops < self._full.full_flops else self._full
            self.released.cache_clear()
        return self._graphs[zero]

    def _make_plan(self, live: Live, graph: "BackwardGraph") -> Plan:
        return graph.cheapest(self._live_slots(live))

    def _live_slots(self, live: Live) -> Slots:
        """The slots of live inputs, and those of no input at all, which are always computed."""
        names = {input_name(i) for i in live}
        slots = enumerate(self._partition.slots)
        return frozenset(
            i for i, name in slots if name in names or (name and name not in self._options.inputs)
        )


class BackwardGraph:
    """One backward graph of a region, and the strategies that run a part of it.

    Args:
        partition: has the graph.
        options: of the region.
    """

    def __init__(self, partition: Partition, options: PlanOptions) -> None:
        self._partition, self._options = partition, options
        self._program = OperatorProgram(partition.backward)
        self._draws = recomputes_random_numbers(partition.backward)

    @property
    def full_flops(self) -> int:
        """FLOPs of the backward with every gradient live."""
        return self._program.flops(range(len(self._partition.slots)))

    def compile_ahead(self) -> None:
        """Compile the chain now, unless it may turn out that no set needs it."""
        if self._options.parts is not None and self._options.cut_chains == "run":
            self._chain  # noqa: B018

    def cheapest(self, live: Slots) -> Plan:
        """The plan that does the least work; chain and leaves in case of a tie."""
        return self.chain_and_leaves(live) or self.least(live)

    def least(self, live: Slots) -> Plan:
        """The plan that does only the work that these gradients need, and reads the fewest saved values."""
        return self.compiled_excerpt(live) if self._must_compile(live) else self.operator_program(live)

    def _must_compile(self, live: Slots) -> bool:
        if self._options.parts is None:
            return False
        if self._options.cut_chains == "compile":
            return True
        return self._draws and recomputes_random_numbers(self._excerpt(live).module)

    def chain_and_leaves(self, live: Slots) -> Plan | None:
        """Run the compiled chain, then leaves; None where that is more work than the live gradients need."""
        if self._options.parts is None:
            return None
        chain = self._chain
        leaves = tuple(leaf for leaf in chain.hoisted.leaves if not leaf.serves.isdisjoint(live))
        flops = chain.flops + sum(leaf.flops for leaf in leaves)
        if not chain.activation <= live or flops != self._program.flops(live):
            return None
        read = {*chain.hoisted.chain.inputs, *(o.index for leaf in leaves for o in leaf.operands if o.saved)}
        program = plan_leaves(chain, leaves, live, len(self._partition.slots))
        return Plan(self._partition.released(read), functools.partial(run_chain, program))

    def operator_program(self, live: Slots) -> Plan:
        """Call the operators that these gradients need one by one."""
        excerpt = self._program.excerpt(live)
        backward = functools.partial(run_part, excerpt.inputs, excerpt.run)
        return Plan(self._partition.released(set(excerpt.inputs)), backward)

    def compiled_excerpt(self, live: Slots) -> Plan:
        """Compile the operators that these gradients need, for this set alone."""
        assert self._options.parts is not None
        excerpt = self._excerpt(live)
        backward = functools.partial(run_part, excerpt.inputs, self._options.parts.compile(excerpt))
        return Plan(self._partition.released(set(excerpt.inputs)), backward)

    def _excerpt(self, live: Slots) -> Part:
        """The part of the graph that these gradients need."""
        excerpt = extract(self._partition.backward, self._partition.gradients(live))
        return Part(narrow_output_masks(excerpt.module), excerpt.inputs)

    @functools.cached_property
    def _chain(self) -> Chain:
        """The compiled backward of the costliest activation gradient; all other gradients are leaves."""
        parts = self._options.parts
        assert parts is not None
        backward = split_convolutions(self._partition.backward)
        slots = {i: name for i, name in enumerate(self._partition.slots) if name is not None}
        activation = self._costliest(i for i, name in slots.items() if name not in self._options.parameters)
        hoisted = hoist_weight_gradients(backward, keep=activation, hoist=slots.keys() - activation)
        calls = {leaf.serves: direct_call(leaf.module) for leaf in hoisted.leaves}
        return Chain(activation, hoisted, parts.compile(hoisted.chain), hoisted.chain.flops, calls)

    def _costliest(self, slots: Iterable[int]) -> Slots:
        """The slot whose gradient alone takes most FLOPs; empty if there are no slots."""
        costs = {slot: self._program.flops({slot}) for slot in slots}
        return frozenset({max(costs, key=costs.__getitem__)} if costs else ())


def direct_call(leaf: fx.GraphModule) -> Callable[..., Any]:
    """Return a leaf as a function that is called fast, and returns a single result without a tuple."""
    graph = fx.Graph()
    results: Any = graph.graph_copy(leaf.graph, {})
    for node in graph.nodes:
        node.target = FUNCTIONS.get(node.target, node.target)
    graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(leaf, graph).forward


def plan_leaves(chain: Chain, leaves: Sequence[Leaf], live: Slots, slots: int) -> ChainProgram:
    """Decide, for one set of live gradients, where each value is kept and until when.

    Args:
        chain: of the backward graph.
        leaves: those that run, in their order.
        live: slots of the live gradients.
        slots: number of slots.
    """
    hoisted = chain.hoisted
    operands = dict.fromkeys(operand for leaf in leaves for operand in leaf.operands)
    saved = tuple(operand.index for operand in operands if operand.saved)
    place = {operand: slots + operand.index for operand in operands if not operand.saved}
    first_saved = slots + hoisted.computed
    place |= {Operand(saved=True, index=index): first_saved + i for i, index in enumerate(saved)}
    last_reader = {operand: i for i, leaf in enumerate(leaves) for operand in leaf.operands}
    calls: list[LeafCall] = []
    for i, leaf in enumerate(leaves):
        results: list[int | None] = [slot if slot in live else None for slot in leaf.slots]
        results += [slots + position for position in leaf.handed_on]
        calls.append(
            (
                chain.calls[leaf.serves],
                pick([place[operand] for operand in leaf.operands]),
                results[0] if len(results) == 1 else results,
                [place[operand] for operand in dict.fromkeys(leaf.operands) if last_reader[operand] == i],
            )
        )
    return ChainProgram(
        inputs=hoisted.chain.inputs,
        run=chain.run,
        slots=slots,
        handed_on=hoisted.handed_on,
        gradients=tuple((slot, slots + i) for i, slot in enumerate(hoisted.chain_slots) if slot in live),
        saved=saved,
        calls=tuple(calls),
    )


def run_chain(program: ChainProgram, inputs: list[Any]) -> Sequence[Any]:
    """Run the chain, then the leaves one by one, and free every value that no later leaf reads."""
    saved = [inputs[i] for i in program.saved]
    values: Values = [None] * program.slots
    values += run_part(program.inputs, program.run, inputs)
    values += [None] * program.handed_on
    values += saved
    del saved
    for slot, position in program.gradients:
        values[slot] = values[position]
    for call, operands, results, last_read in program.calls:
        if isinstance(results, list):
            for place, value in zip(results, call(*operands(values)), strict=True):
                if place is not None:
                    values[place] = value
        elif results is not None:
            values[results] = call(*operands(values))
        for position in last_read:
            values[position] = None
    return values[: program.slots]


def recomputes_random_numbers(module: fx.GraphModule) -> bool:
    """Whether a backward graph draws random numbers again, which only compiled code can do."""
    return any(INDUCTOR_RANDOM in str(node.target) for node in module.graph.nodes)
