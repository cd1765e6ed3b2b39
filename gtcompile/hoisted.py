"""Hoisted variants: one compilation serves every set of live gradients.

AOTAutograd traces and partitions the region once, with every gradient live. Its backward is split into the
chain of activation gradients, which is compiled, and leaves, which are not (`passes/hoisting.py`): weight
gradients, and those of what else a block is given, such as the encoder's output in a decoder. For every set
of live gradients a *plan* says which saved values the forward may let go, and what the backward runs:

* the compiled chain, then the leaves of the trained parameters, where the whole chain is needed;
* where it is not, in the block in which the backward ends: what is needed of the backward graph, operator by
  operator (`programs.py`), for a compilation would cost seconds for one block of many.

Either way the FLOPs are exactly those of the live gradients.
"""

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from gtcompile.autograd_nodes import region_node
from gtcompile.background import Contest
from gtcompile.dependencies import SharedWork, costs_of
from gtcompile.joint import JointGraph
from gtcompile.operators import Boxed, boxed, run_operators
from gtcompile.partitions import partition
from gtcompile.parts import InductorParts, resumable_compilation, run_part, without_donation
from gtcompile.passes.hoisting import HoistedBackward, Leaf, Operand, extract, hoist_weight_gradients
from gtcompile.passes.output_masks import narrow_masks
from gtcompile.passes.split_convolutions import split_convolutions
from gtcompile.passes.zero_tangents import without_zero_tangents
from gtcompile.programs import Program
from gtcompile.region_graph import Live, input_name, region_joint
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    TangentAOTInput,
    aot_autograd,
    compile_fx,
    compile_fx_inner,
    current_autograd_node,
    get_hash_for_files,
)

PLAN = "gtcompile.plan"
"""Key of the plan in the metadata of a region's autograd node."""

LIVE = "gtcompile.live"
"""The same of the set of live gradients."""

ZERO = "gtcompile.zero"
"""The same of the tangents that are zero because nothing was differentiated through their outputs."""

PLANS_KEPT = 256
"""Plans a region keeps, the least recently used is dropped; making one again takes microseconds."""

CODE_KEPT = 16
"""The same where a plan may have code of its own."""

Slots = frozenset[int]
"""Positions among the gradients a backward graph returns."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one set of live gradients asks of a region."""

    released: tuple[int, ...]
    """Positions among the forward graph's outputs of the saved values that the backward will not read."""
    backward: Boxed
    """From the backward graph's inputs to one gradient or None per slot."""


@dataclass(frozen=True, slots=True)
class Partition:
    """The two graphs of a region with every gradient live."""

    backward: fx.GraphModule
    """Inputs: saved values and tangents; outputs: one gradient or None per slot."""
    saved: dict[int, int]
    """Of the saved tensors: from positions among the backward's inputs to positions among the forward's
    outputs."""
    slots: tuple[str | None, ...]
    """Per slot, the name of the region's input it is the gradient of."""
    tangents: dict[int, int | None]
    """From positions of the tangents among the backward's inputs to those of their outputs among the
    forward's; None for an output that is not one of the forward's."""

    def without(self, zero: frozenset[int]) -> "Partition":
        """The same where the tangents at some positions are known to be zero."""
        backward = without_zero_tangents(self.backward, self.tangents, zero)
        return dataclasses.replace(self, backward=backward)

    def gradients(self, live: Slots) -> list[fx.Node | None]:
        """The backward's outputs, None where the slot is not live."""
        outputs: Any = self.backward.graph.output_node().args[0]
        return [node if slot in live else None for slot, node in enumerate(outputs)]

    def work(self) -> tuple[SharedWork, ...]:
        """The backward's FLOPs by the slots that need them, written as decimals."""
        slots = tuple(map(str, range(len(self.slots))))
        return costs_of(JointGraph(module=self.backward, forward_outputs=0, slots=slots)).shared_work

    def released(self, read: set[int]) -> tuple[int, ...]:
        """Where among the forward's outputs the saved values are that the backward will not read."""
        return tuple(output for position, output in self.saved.items() if position not in read)


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


class NoBackwardError(Exception):
    """A region computes nothing that could be differentiated: where tokens go, say, and its own inputs."""


class HoistingPartitioner(CustomPartitionerFn):
    """Splits the joint graph within a budget of memory, and keeps a copy of the result."""

    partition: Partition | None = None
    """None where AOTAutograd found nothing to split."""

    def __init__(self, memory_budget: float) -> None:
        self.memory_budget = memory_budget

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward."""
        slots, outputs = region_joint(gm).slots, kwargs["num_fwd_outputs"]
        descriptors = gm.graph.output_node().meta["desc"][:outputs]
        forward, backward = partition(gm, joint_inputs, self.memory_budget, **kwargs)
        saved = _saved_positions(forward, backward, outputs)
        self.partition = Partition(_copy(backward), saved, slots, _tangent_positions(backward, descriptors))
        return forward, backward

    def uuid(self) -> str:
        """Tells Inductor's cache that what is compiled under this key is given nothing to overwrite."""
        return f"hoisted: {self.memory_budget} {get_hash_for_files((__file__,))!r}"


def _saved_positions(forward: fx.GraphModule, backward: fx.GraphModule, first_saved: int) -> dict[int, int]:
    """Per tensor the forward saves, its place among the backward's inputs and among the forward's outputs.

    They go by one name, except random states saved for recomputation, which come in one order.
    """
    positions = {node.name: i for i, node in enumerate(backward.graph.find_nodes(op="placeholder"))}
    outputs: Any = forward.graph.output_node().args[0]
    tensors = [(i, node.name) for i, node in enumerate(outputs) if i >= first_saved and _is_tensor(node)]
    random_states = (i for name, i in positions.items() if name.startswith("rng_state_output"))
    return {positions[name] if name in positions else next(random_states): i for i, name in tensors}


def _tangent_positions(backward: fx.GraphModule, outputs: Sequence[object]) -> dict[int, int | None]:
    """From the backward's inputs that are tangents to the outputs of the forward that they belong to."""
    meanings = enumerate(node.meta.get("desc") for node in backward.graph.find_nodes(op="placeholder"))
    of_outputs = {i: meaning.output for i, meaning in meanings if isinstance(meaning, TangentAOTInput)}
    places: dict[object, int] = {output: i for i, output in enumerate(outputs)}
    return {i: places.get(output) for i, output in of_outputs.items()}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        twin[node] = graph.node_copy(node, twin.__getitem__)
    return fx.GraphModule(module, graph)


class HoistedVariants:
    """One compilation of a region, and a plan for each set of live gradients it was asked for."""

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        compiler: Literal["inductor", "eager"],
        patches: Mapping[str, Any],
        cut_chains: Literal["run", "compile"],
        memory_budget: float,
        beside: bool,
        parameters: frozenset[int],
    ) -> None:
        self._compiler = compiler
        self._patches = patches
        self._cut_chains = cut_chains
        self._memory_budget = memory_budget
        self._parameters = {input_name(i) for i in parameters}
        self._activations = [i for i in range(len(example_inputs)) if i not in parameters]
        self._inputs = {input_name(i) for i in range(len(example_inputs))}
        self._beside = beside and compiler == "inductor"
        self._current = threading.local()
        partition, self._code = self._compile(graph, example_inputs)
        self._plan_backwards(partition)
        if compiler == "inductor" and cut_chains == "run":
            self._chain  # noqa: B018  compiled now, or the first set to need it would wait for it

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        plan = self._current.plan = self._plan_for(live)
        outputs = self._code(*inputs)
        node = region_node(outputs, [inputs[i] for i in self._activations])
        if node is not None:
            metadata: Any = node.metadata
            metadata[PLAN], metadata[LIVE] = plan, live
            if len(self._partition.tangents) > 1:
                node.register_prehook(functools.partial(_note_zero, metadata, self._partition.tangents))
        return outputs

    def saves_without(self, zero: frozenset[int]) -> "HoistedVariants | None":
        """The variants for backwards in which some tangents are zero, if that saves any FLOPs.

        Args:
            zero: positions among the backward's inputs.
        """
        if zero not in self._without_zero:
            partition = self._partition.without(zero)
            saves = _total(partition.work()) < _total(self._work)
            self._without_zero[zero] = self._twin(partition) if saves else None
            self._plan_for.cache_clear()  # what those backwards read is not let go from now on
        return self._without_zero[zero]

    def _twin(self, partition: Partition) -> "HoistedVariants":
        twin = copy.copy(self)
        twin._plan_backwards(partition)
        return twin

    def _plan_backwards(self, partition: Partition) -> None:
        """Make ready to plan backwards by a partition of this region."""
        self._partition = partition
        self._plan_for = functools.lru_cache(CODE_KEPT if self._beside else PLANS_KEPT)(self._plan)
        self._plan_within = functools.lru_cache(PLANS_KEPT)(self._plan_with_released)
        self.__dict__.pop("_chain", None)  # of the partition this is a twin's of
        self._without_zero: dict[frozenset[int], HoistedVariants | None] = {}
        self._work = partition.work()
        self._program = Program(partition.backward)
        self._generates_random = draws_random_numbers(partition.backward)

    def _compile(
        self, graph: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[Partition, Callable[..., Any]]:
        """Compile the forward, and learn how parts of the backward are compiled.

        Raises:
            NoBackwardError: there is no backward.
        """
        partitioner = HoistingPartitioner(self._memory_budget)
        code: Any
        with without_donation():
            if self._compiler == "inductor":
                patches = {**self._patches, "custom_partitioner_fn": partitioner}
                code = compile_fx(graph, example_inputs, inner_compile=self._inductor, config_patches=patches)
            else:
                code = aot_autograd(
                    fw_compiler=lambda module, inputs: self._forward(run_operators(module)),
                    bw_compiler=lambda module, inputs: boxed(self._run_plan),
                    partition_fn=partitioner,
                    keep_inference_input_mutations=True,
                )(graph, example_inputs)
        if partitioner.partition is None:
            raise NoBackwardError
        return partitioner.partition, code

    def _inductor(self, module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """Inductor's `inner_compile`: the forward as ever; of the backward, only what its parts will need."""
        if not options.get("is_backward"):
            return self._forward(compile_fx_inner(module, example_inputs, **options))
        self._parts = InductorParts(example_inputs, options, self._patches, resumable_compilation())
        return boxed(self._run_plan)

    def _forward(self, compiled: Callable[[list[Any]], Any]) -> Boxed:
        """The compiled forward, which lets go of what the plan's backward will not read."""

        def forward(inputs: list[Any]) -> Sequence[Any]:
            outputs = list(compiled(inputs))
            for position in self._current.plan.released:
                outputs[position] = outputs[position].new_empty(0)
            return outputs

        return boxed(forward)

    def _run_plan(self, inputs: list[Any]) -> Sequence[Any]:
        """The backward, by the plan its forward ran with."""
        metadata: Any = current_autograd_node().metadata
        plan: Plan = metadata[PLAN]
        zero: frozenset[int] = metadata.get(ZERO, frozenset())
        if zero and (variants := self.saves_without(zero)) is not None:
            plan = variants._plan_within(metadata[LIVE], plan.released)
        return plan.backward(inputs)

    def _plan_with_released(self, live: Live, released: tuple[int, ...]) -> Plan:
        """The plan for values of which a forward has let some go already."""
        plan = self._plan_for(live)
        if set(released) <= set(plan.released):
            return plan
        slots = self._live_slots(live)  # the least that can be read
        return self._compiled_rest(slots) or self._rest(slots)

    def _live_slots(self, live: Live) -> Slots:
        names = {input_name(i) for i in live}
        slots = enumerate(self._partition.slots)
        return frozenset(i for i, name in slots if name in names or (name and name not in self._inputs))

    def _plan(self, live: Live) -> Plan:
        plan = self._plan_by_itself(live)
        others = [v._plan_for(live) for v in self._without_zero.values() if v is not None]
        kept = {i for i in plan.released if any(i not in other.released for other in others)}
        return Plan(tuple(i for i in plan.released if i not in kept), plan.backward)

    def _plan_by_itself(self, live: Live) -> Plan:
        live_slots = self._live_slots(live)
        plan = None
        if self._compiler == "inductor":
            plan = self._whole_chain(live_slots) or self._compiled_rest(live_slots)
        plan = plan or self._rest(live_slots)
        return self._contested(plan, live_slots) if self._beside and self._parts.static else plan

    def _contested(self, plan: Plan, live: Slots) -> Plan:
        """The plan, until code for this set alone, compiled beside the training, is faster."""
        needed = extract(self._partition.backward, self._partition.gradients(live))
        narrow_masks(needed.module.graph)
        contest = Contest(
            plan.backward,
            prepare=lambda: self._parts.compile_beside(needed),
            fetch=lambda: functools.partial(run_part, needed.inputs, self._parts.compile(needed)),
        )
        unread = set(self._partition.released(set(needed.inputs)))
        return Plan(tuple(i for i in plan.released if i in unread), contest)

    def _rest(self, live: Slots) -> Plan:
        """The plan that runs what is needed operator by operator."""
        excerpt = self._program.excerpt(live)
        backward = functools.partial(run_part, excerpt.inputs, excerpt.run)
        return Plan(self._partition.released(set(excerpt.inputs)), backward)

    def _compiled_rest(self, live: Slots) -> Plan | None:
        """The plan that compiles what is needed, where that is asked for or only compiled code can run it."""
        if self._cut_chains == "run" and not self._generates_random:
            return None
        needed = extract(self._partition.backward, self._partition.gradients(live))
        if self._cut_chains == "run" and not draws_random_numbers(needed.module):
            return None
        narrow_masks(needed.module.graph)
        backward = functools.partial(run_part, needed.inputs, self._parts.compile(needed))
        return Plan(self._partition.released(set(needed.inputs)), backward)

    def _whole_chain(self, live: Slots) -> Plan | None:
        """The plan that runs the compiled chain, unless that would do more than the live gradients need."""
        chain = self._chain
        leaves = tuple(leaf for leaf in chain.hoisted.leaves if leaf.slot in live)
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
        backward = _copy(self._partition.backward)
        split_convolutions(backward.graph)
        slots = {i: name for i, name in enumerate(self._partition.slots) if name is not None}
        activation = self._costliest(i for i, name in slots.items() if name not in self._parameters)
        hoisted = hoist_weight_gradients(backward, keep=activation, hoist=slots.keys() - activation)
        return Chain(activation, hoisted, self._parts.compile(hoisted.chain), hoisted.chain.flops)

    def _costliest(self, slots: Iterable[int]) -> Slots:
        """The slot whose gradient takes most FLOPs, by itself; nothing where there are none."""
        costs = {slot: self._flops({slot}) for slot in slots}
        return frozenset({max(costs, key=costs.__getitem__)} if costs else ())

    def _flops(self, live: Iterable[int]) -> int:
        """FLOPs of a backward that computes these slots and no others."""
        names = set(map(str, live))
        return sum(work.flops for work in self._work if not work.parameters.isdisjoint(names))


def _note_zero(
    metadata: dict[str, Any], tangents: Mapping[int, int | None], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Note, before a backward runs, which of its tangents autograd has no gradient for."""
    of_outputs = ((i, output) for i, output in tangents.items() if output is not None)
    metadata[ZERO] = frozenset(i for i, output in of_outputs if gradients[output] is None)


def _total(work: Iterable[SharedWork]) -> int:
    return sum(shared.flops for shared in work)


def with_last_reads(leaves: Sequence[Leaf]) -> tuple[tuple[Leaf, tuple[Operand, ...]], ...]:
    """Each leaf, and those of its operands that no later leaf reads."""
    last = {operand: leaf.slot for leaf in leaves for operand in leaf.operands}
    return tuple((leaf, tuple(o for o in leaf.operands if last[o] == leaf.slot)) for leaf in leaves)


def run_chain(
    chain: Chain,
    leaves: Sequence[tuple[Leaf, Sequence[Operand]]],
    live: Slots,
    slots: int,
    inputs: list[Any],
) -> Sequence[Any]:
    """Run the chain, then the leaves one by one; what no later leaf reads is let go."""
    saved = {o.index: inputs[o.index] for leaf, _ in leaves for o in leaf.operands if o.saved}
    computed = list(run_part(chain.hoisted.chain.inputs, chain.run, inputs))
    gradients: list[Any] = [None] * slots
    for position, slot in enumerate(chain.hoisted.chain_slots):
        if slot in live:
            gradients[slot] = computed[position]
    for leaf, last_read in leaves:
        operands = [saved[o.index] if o.saved else computed[o.index] for o in leaf.operands]
        gradients[leaf.slot] = leaf.module.forward(*operands)
        del operands
        for operand in last_read:
            (saved if operand.saved else computed)[operand.index] = None
    return gradients


def draws_random_numbers(module: fx.GraphModule) -> bool:
    """Whether a backward recomputes random numbers that only compiled code can draw again."""
    return any("inductor_rand" in str(node.target) for node in module.graph.nodes)
