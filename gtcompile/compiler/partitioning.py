"""A joint graph split into forward and backward, saving no more for backward than a budget of memory."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtcompile.compiler.region_graph import region_joint
from gtcompile.costs.backward_costs import SharedWork, costs_of
from gtcompile.graph.joint_graph import JointGraph, copy_module
from gtcompile.passes.random_draws import save_random_draws
from gtcompile.passes.zero_tangents import without_zero_tangents
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    TangentAOTInput,
    functorch_config,
    get_hash_for_files,
    min_cut_rematerialization_partition,
)

LEAST_BUDGET = 1e-9
"""Stands for 0, at which torch's partitioner saves the inputs and nothing else, random numbers included."""
Slots = frozenset[int]
"""Positions among the gradients a backward graph returns."""


def partition(
    graph: fx.GraphModule, joint_inputs: Sequence[object], memory_budget: float, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph where least is saved for backward, and recompute what a budget leaves no room for.

    Sound because whatever draws random numbers is saved: drawn again, they would be others.

    Args:
        graph: taken over.
        joint_inputs: as AOTAutograd hands them to a partitioner.
        memory_budget: the share, in [0, 1], of the bytes saved beside the inputs when nothing that costs
            FLOPs is recomputed.
        **kwargs: as AOTAutograd hands them to a partitioner.
    """
    if memory_budget < 1:
        graph = save_random_draws(graph)
    with functorch_config.patch(activation_memory_budget=max(memory_budget, LEAST_BUDGET)):
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)
    return forward, backward


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
        self.partition = Partition(
            copy_module(backward), saved, slots, _tangent_positions(backward, descriptors)
        )
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
