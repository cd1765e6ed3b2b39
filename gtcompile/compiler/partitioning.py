"""Splits a joint graph into forward and backward, within a memory budget for saved values."""

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtcompile.compiler.region_graph import region_joint
from gtcompile.graph.flops import forward_gradients, has_flops
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.effect_tokens import EFFECTS, drop_effect_tokens
from gtcompile.passes.random_draws import save_random_draws
from gtcompile.passes.zero_tangents import without_zero_tangents
from gtcompile.torch_internals import (
    DESCRIPTOR,
    FREE_TO_SAVE,
    IN_BACKWARD,
    PARTITIONER_TAG,
    SAVED_RANDOM_STATE,
    CustomPartitionerFn,
    OpOverload,
    ParamAOTInput,
    PlainAOTInput,
    TangentAOTInput,
    functorch_config,
    get_hash_for_files,
    min_cut_rematerialization_partition,
)

LEAST_BUDGET = 1e-9
"""Used instead of 0, at which torch's partitioner saves only the inputs and draws random numbers again."""
Slots = frozenset[int]
"""Positions among the gradients a backward graph returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMemory:
    """What the partitioner knows about the memory of saved values."""

    budget: float
    """Fraction, in [0, 1], of the bytes that would be saved, inputs aside, if nothing that costs FLOPs were
    recomputed."""
    parameters: tuple[int, ...]
    """Positions of the region's inputs that exist anyway, so that saving them costs nothing."""


def partition(
    graph: fx.GraphModule, joint_inputs: Sequence[object], memory: SavedMemory, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph so that the least memory is saved for the backward; recompute above the budget.

    Sound because the results of operators that draw random numbers are always saved: drawn again, the numbers
    would differ.

    Args:
        graph: changed.
        joint_inputs: as AOTAutograd hands them to a partitioner.
        memory: how many bytes may be saved, and what is free to save.
        **kwargs: as AOTAutograd hands them to a partitioner; Inductor leaves out the inputs that are free.
    """
    kwargs[FREE_TO_SAVE] = _positions_of(graph, memory.parameters)
    if memory.budget < 1:
        graph = save_random_draws(graph)
    with functorch_config.patch(activation_memory_budget=max(memory.budget, LEAST_BUDGET)):
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)
    return forward, backward


def _positions_of(graph: fx.GraphModule, inputs: Sequence[int]) -> list[int]:
    """Positions among a joint graph's inputs of some inputs of its region, and of what is called a parameter.

    Inputs are called so in the graph of a whole model; in that of a region all are plain inputs.
    """
    meanings = (node.meta.get(DESCRIPTOR) for node in graph.graph.find_nodes(op="placeholder"))
    return [
        i
        for i, of in enumerate(meanings)
        if isinstance(of, ParamAOTInput) or (isinstance(of, PlainAOTInput) and of.idx in inputs)
    ]


@dataclass(frozen=True, slots=True)
class Partition:
    """The two graphs of a region with every gradient live."""

    backward: fx.GraphModule
    """Inputs: saved values and tangents; outputs: one gradient or None per slot."""
    saved: dict[int, int]
    """The saved tensors: from their position among the backward's inputs to that among the forward's
    outputs."""
    slots: tuple[str | None, ...]
    """Per slot, the name of the region's input it is the gradient of."""
    tangents: dict[int, int | None]
    """From the position of a tangent among the backward's inputs to the position of its output among the
    forward's outputs; None for an output that is not one of the forward's."""

    def without(self, zero: frozenset[int]) -> "Partition":
        """Return this partition with a smaller backward for tangents that are zero.

        Args:
            zero: positions of the zero tangents among the backward's inputs.
        """
        backward = without_zero_tangents(self.backward, self.tangents, zero)
        return dataclasses.replace(self, backward=backward)

    def gradients(self, live: Slots) -> list[fx.Node | None]:
        """The backward's outputs, None where the slot is not live."""
        outputs: Any = self.backward.graph.output_node().args[0]
        return [node if slot in live else None for slot, node in enumerate(outputs)]

    def released(self, read: Set[int]) -> frozenset[int]:
        """Positions among the forward's outputs of the saved values that a backward does not read.

        Args:
            read: positions among the backward's inputs of what it reads.
        """
        return frozenset(output for position, output in self.saved.items() if position not in read)


class NotHoistableError(Exception):
    """One compilation cannot serve every set."""


class ForwardGradientsError(NotHoistableError):
    """An operator computes gradients in the forward, which hoisted variants compile once for all sets."""


class BackwardWritesError(NotHoistableError):
    """The backward writes to an input of the region, such as a buffer."""


def refuse_backward_writes(graph: fx.GraphModule) -> None:
    """Refuse a joint graph whose backward writes to an input.

    In eager PyTorch an autograd function that writes in its backward does so only if a gradient needs it. The
    joint graph does not say which gradients these are.

    Raises:
        BackwardWritesError: an autograd function of the model writes in its backward.
    """
    for node in graph.graph.nodes:
        writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        if writes and node.meta.get(PARTITIONER_TAG) == IN_BACKWARD:
            raise BackwardWritesError("the backward of an autograd function writes to a tensor from outside")


def keep_products_in_backward(joint: JointGraph) -> None:
    """Tag the products that only gradients need, so that the partitioner puts none of them into the forward.

    An autograd function may compute a weight gradient in its forward, as fused losses do. In the backward the
    products are leaves, and run only for trained parameters.

    Args:
        joint: its nodes get the tag.
    """
    forward = joint.forward_nodes()
    for node in joint.graph.nodes:
        if node not in forward and has_flops(node):
            node.meta[PARTITIONER_TAG] = IN_BACKWARD


class HoistingPartitioner(CustomPartitionerFn):
    """Splits the joint graph within a memory budget, and keeps the backward graph."""

    partition: Partition | None = None
    """None where AOTAutograd found nothing to split."""

    def __init__(self, memory: SavedMemory) -> None:
        self.memory = memory

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward.

        Raises:
            ForwardGradientsError: the forward would compute gradients for every trained set.
            BackwardWritesError: the backward writes to an input.
        """
        refuse_backward_writes(gm)
        outputs = kwargs["num_fwd_outputs"]
        joint = region_joint(gm)
        if any(forward_gradients(node) for node in gm.graph.nodes):
            raise ForwardGradientsError(
                "an operator computes gradients in the forward, and the loss does not use some outputs"
            )
        keep_products_in_backward(joint)
        slots = tuple(None if name == EFFECTS else name for name in joint.slots)
        descriptors = gm.graph.output_node().meta["desc"][:outputs]
        forward, backward = partition(gm, joint_inputs, self.memory, **kwargs)
        saved = _saved_positions(forward, backward, outputs)
        tangents = _tangent_positions(backward, descriptors)
        self.partition = Partition(drop_effect_tokens(backward), saved, slots, tangents)
        return forward, backward

    def uuid(self) -> str:
        """Return a key for Inductor's cache under which no code overwrites saved values."""
        return f"hoisted: {self.memory} {get_hash_for_files((__file__,))!r}"


def _saved_positions(forward: fx.GraphModule, backward: fx.GraphModule, first_saved: int) -> dict[int, int]:
    """Per saved tensor, its position among the backward's inputs and among the forward's outputs.

    A saved tensor has the same name in both graphs, except for random states saved for recomputation: these
    come in the same order.
    """
    positions = {node.name: i for i, node in enumerate(backward.graph.find_nodes(op="placeholder"))}
    outputs: Any = forward.graph.output_node().args[0]
    tensors = [(i, node.name) for i, node in enumerate(outputs) if i >= first_saved and _is_tensor(node)]
    random_states = (i for name, i in positions.items() if name.startswith(SAVED_RANDOM_STATE))
    return {positions[name] if name in positions else next(random_states): i for i, name in tensors}


def _tangent_positions(backward: fx.GraphModule, outputs: Sequence[object]) -> dict[int, int | None]:
    """From the backward's inputs that are tangents to the outputs of the forward that they belong to."""
    meanings = enumerate(node.meta.get("desc") for node in backward.graph.find_nodes(op="placeholder"))
    of_outputs = {i: meaning.output for i, meaning in meanings if isinstance(meaning, TangentAOTInput)}
    places: dict[object, int] = {output: i for i, output in enumerate(outputs)}
    return {i: places.get(output) for i, output in of_outputs.items()}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
