"""Plans: how a hoisted region runs its backward for each set of live gradients.

The backward graph is split into the chain of activation gradients, which is compiled, and leaves, which are
not (`passes/hoisting.py`): weight gradients, and those of what else a block is given, such as the encoder's
output in a decoder. A plan runs

* the compiled chain, then the leaves of the live gradients, where the whole chain is needed;
* where it is not, in the block in which the backward ends: what is needed of the backward graph, operator by
  operator (`programs.py`), for a compilation would cost seconds for one block of many.

Either way the FLOPs are exactly those of the live gradients.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from gtcompile.compiler.background import Contest
from gtcompile.compiler.inductor import InductorParts, run_part
from gtcompile.compiler.operator_program import Program
from gtcompile.compiler.operators import Boxed
from gtcompile.compiler.partitioning import Partition, Slots
from gtcompile.compiler.region_graph import Live, input_name
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.passes.hoisting import HoistedBackward, Leaf, Operand, Part, extract, hoist_weight_gradients
from gtcompile.passes.output_masks import narrow_output_masks
from gtcompile.passes.split_convolutions import split_convolutions

PLANS_KEPT = 256
"""Plans a region keeps, the least recently used is dropped; making one again takes microseconds."""
CODE_KEPT = 16
"""The same where a plan may have code of its own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one set of live gradients asks of a region."""

    released: tuple[int, ...]
    """Positions among the forward graph's outputs of the saved values that the backward will not read."""
    backward: Boxed
    """From the backward graph's inputs to one gradient or None per slot."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The backward of a region, split and compiled."""

    activation: Slots
    """The slot it leads to, if any."""
    hoisted: HoistedBackward
    run: Boxed
    """The compiled part."""
    flops: int
    """FLOPs of the compiled part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What all plans of a region have in common."""

    parts: InductorParts | None
    """How Inductor compiles parts of the backward; None where no code is generated."""
    parameters: frozenset[str]
    """Names of the region's inputs that are parameters."""
    inputs: frozenset[str]
    """Names of all of the region's inputs."""
    cut_chains: Literal["run", "compile"]
    """Whether what is left of a chain runs operator by operator or is compiled."""
    beside: bool
    """Whether another process compiles the backward of sets that stay."""


class Plans:
    """The plans of a region, each made when it is first asked for.

    Args:
        partition: of the region.
        options: of the region.
    """

    def __init__(self, partition: Partition, options: PlanOptions) -> None:
        self._partition, self._options = partition, options
        self.of = functools.lru_cache(CODE_KEPT if options.beside else PLANS_KEPT)(self._plan)
        self.within = functools.lru_cache(PLANS_KEPT)(self._plan_within)
        self._without_zero: dict[frozenset[int], Plans | None] = {}
        self._work = partition.work()
        self._program = Program(partition.backward)
        self._random = recomputes_random_numbers(partition.backward)

    def without(self, zero: frozenset[int]) -> "Plans | None":
        """The plans for backwards in which some tangents are zero, if that saves any FLOPs.

        Args:
            zero: positions among the backward's inputs.
        """
        if zero not in self._without_zero:
            plans = Plans(self._partition.without(zero), self._options)
            self._without_zero[zero] = plans if _total(plans._work) < _total(self._work) else None
            self.of.cache_clear()  # what those backwards read is not let go from now on
        return self._without_zero[zero]

    def compile_chain(self) -> None:
        """Compile now what the first set to need it would wait for."""
        if self._options.parts is not None and self._options.cut_chains == "run":
            self._chain  # noqa: B018

    def _plan_within(self, live: Live, released: tuple[int, ...]) -> Plan:
        """The plan for values of which a forward has let some go already."""
        plan = self.of(live)
        return plan if set(released) <= set(plan.released) else self._least(self._live_slots(live))

    def _live_slots(self, live: Live) -> Slots:
        names = {input_name(i) for i in live}
        slots = enumerate(self._partition.slots)
        return frozenset(
            i for i, name in slots if name in names or (name and name not in self._options.inputs)
        )

    def _plan(self, live: Live) -> Plan:
        plan = self._plan_by_itself(self._live_slots(live))
        others = [plans.of(live) for plans in self._without_zero.values() if plans is not None]
        kept = {i for i in plan.released if any(i not in other.released for other in others)}
        return Plan(tuple(i for i in plan.released if i not in kept), plan.backward)

    def _plan_by_itself(self, live: Slots) -> Plan:
        parts = self._options.parts
        if parts is None:
            return self._least(live)
        plan = self._whole_chain(live) or self._least(live)
        return self._contested(plan, live, parts) if self._options.beside and parts.static else plan

    def _contested(self, plan: Plan, live: Slots, parts: InductorParts) -> Plan:
        """The plan, until code for this set alone, compiled beside the training, is faster."""
        needed = self._needed(live)
        contest = Contest(
            plan.backward,
            prepare=lambda: parts.compile_beside(needed),
            fetch=lambda: functools.partial(run_part, needed.inputs, parts.compile(needed)),
        )
        unread = set(self._partition.released(set(needed.inputs)))
        return Plan(tuple(i for i in plan.released if i in unread), contest)

    def _least(self, live: Slots) -> Plan:
        """The plan that runs what is needed and nothing else, by itself.

        It is compiled where that is asked for, or where only compiled code can run it.
        """
        parts, run = self._options.parts, self._options.cut_chains == "run"
        if parts is None or (run and not self._random):
            return self._operators(live)
        needed = self._needed(live)
        if run and not recomputes_random_numbers(needed.module):
            return self._operators(live)
        backward = functools.partial(run_part, needed.inputs, parts.compile(needed))
        return Plan(self._partition.released(set(needed.inputs)), backward)

    def _operators(self, live: Slots) -> Plan:
        """The plan that runs what is needed operator by operator."""
        excerpt = self._program.excerpt(live)
        backward = functools.partial(run_part, excerpt.inputs, excerpt.run)
        return Plan(self._partition.released(set(excerpt.inputs)), backward)

    def _needed(self, live: Slots) -> Part:
        """What is needed of the backward graph."""
        needed = extract(self._partition.backward, self._partition.gradients(live))
        return Part(narrow_output_masks(needed.module), needed.inputs)

    def _whole_chain(self, live: Slots) -> Plan | None:
        """The plan that runs the compiled chain, unless that would do more than the live gradients need."""
        chain = self._chain
        leaves = tuple(leaf for leaf in chain.hoisted.leaves if not leaf.serves.isdisjoint(live))
        flops = chain.flops + sum(leaf.flops for leaf in leaves)
        if not chain.activation <= live or flops != self._flops(live):
            return None
        read = {*chain.hoisted.chain.inputs, *(o.index for leaf in leaves for o in leaf.operands if o.saved)}
        backward = functools.partial(
            run_chain, chain, with_last_reads(leaves), live, len(self._partition.slots)
        )
        return Plan(self._partition.released(read), backward)

    @functools.cached_property
    def _chain(self) -> Chain:
        """The compiled backward of the activation whose gradient takes most; other gradients are leaves."""
        parts = self._options.parts
        assert parts is not None
        backward = split_convolutions(self._partition.backward)
        slots = {i: name for i, name in enumerate(self._partition.slots) if name is not None}
        activation = self._costliest(i for i, name in slots.items() if name not in self._options.parameters)
        hoisted = hoist_weight_gradients(backward, keep=activation, hoist=slots.keys() - activation)
        return Chain(activation, hoisted, parts.compile(hoisted.chain), hoisted.chain.flops)

    def _costliest(self, slots: Iterable[int]) -> Slots:
        """The slot whose gradient takes most FLOPs, by itself; nothing where there are none."""
        costs = {slot: self._flops({slot}) for slot in slots}
        return frozenset({max(costs, key=costs.__getitem__)} if costs else ())

    def _flops(self, live: Iterable[int]) -> int:
        """FLOPs of a backward that computes these slots and no others."""
        names = set(map(str, live))
        return sum(work.flops for work in self._work if not work.parameters.isdisjoint(names))


def _total(work: Iterable[SharedWork]) -> int:
    return sum(shared.flops for shared in work)


def with_last_reads(leaves: Sequence[Leaf]) -> tuple[tuple[Leaf, tuple[Operand, ...]], ...]:
    """Each leaf, and those of its operands that no later leaf reads."""
    last = {operand: i for i, leaf in enumerate(leaves) for operand in leaf.operands}
    return tuple((leaf, tuple(o for o in leaf.operands if last[o] == i)) for i, leaf in enumerate(leaves))


def run_chain(
    chain: Chain,
    leaves: Sequence[tuple[Leaf, Sequence[Operand]]],
    live: Slots,
    slots: int,
    inputs: list[Any],
) -> Sequence[Any]:
    """Run the chain, then the leaves one by one; what no later leaf reads is let go."""
    hoisted = chain.hoisted
    saved = {o.index: inputs[o.index] for leaf, _ in leaves for o in leaf.operands if o.saved}
    computed = [*run_part(hoisted.chain.inputs, chain.run, inputs), *[None] * hoisted.handed_on]
    gradients: list[Any] = [None] * slots
    for position, slot in enumerate(hoisted.chain_slots):
        if slot in live:
            gradients[slot] = computed[position]
    for leaf, last_read in leaves:
        operands = [saved[o.index] if o.saved else computed[o.index] for o in leaf.operands]
        results = list(leaf.module.forward(*operands))
        del operands
        for position in reversed(leaf.handed_on):
            computed[position] = results.pop()
        for slot in reversed(leaf.slots):
            gradients[slot] = results.pop() if slot in live else None
        for operand in last_read:
            (saved if operand.saved else computed)[operand.index] = None
    return gradients


def recomputes_random_numbers(module: fx.GraphModule) -> bool:
    """Whether a backward draws random numbers again, which only compiled code can."""
    return any("inductor_rand" in str(node.target) for node in module.graph.nodes)
