"""A region: one graph that Dynamo captured, its variants for different trained sets, and the dispatch between them."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from gtcompile import trained
from gtcompile.capture import count_forward_outputs
from gtcompile.errors import GraphContractError
from gtcompile.joint import JointGraph
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    GradAOTOutput,
    PlainAOTInput,
    TracingContext,
    aot_autograd,
    boxed_nop_preserve_node_meta,
    compile_fx,
    get_hash_for_files,
    min_cut_rematerialization_partition,
    tracing,
)

logger = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Live = frozenset[int]
"""Positions of the region's inputs whose gradients are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOptions:
    """How the regions of one compiled model are made."""

    compiler: Literal["inductor", "eager"] = "inductor"
    """`inductor` generates code; `eager` runs the rewritten graphs operator by operator, bit-equal to eager PyTorch."""
    variants: Literal["specialized", "hoisted"] = "specialized"
    """`specialized` compiles anew for each trained set; `hoisted` compiles once."""
    variants_kept: int = 16
    """How many compiled variants a region keeps; the least recently used is dropped."""


class Region:
    """A captured graph that computes gradients for exactly the trained ones among the parameters it is called with."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], options: RegionOptions) -> None:
        self.graph = graph
        self.options = options
        self.differentiable = torch.is_grad_enabled()
        self.parameter_positions = [i for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)]
        self._tracing_context = TracingContext.get()
        self._example_inputs = _fake_inputs(graph, example_inputs)
        self._variants: OrderedDict[Live, Compiled] = OrderedDict()
        self._live_by_parameters: dict[tuple[int, ...], Live] = {}
        self._generation = -1

    def __call__(self, *inputs: Any) -> Any:
        """Run the variant for what is trained now among `inputs`."""
        live = self._live(inputs)
        variant = self._variants.get(live)
        if variant is not None:
            self._variants.move_to_end(live)
            return variant(*inputs)
        variant = self._variants[live] = self._build(live)
        if len(self._variants) > self.options.variants_kept:
            self._variants.popitem(last=False)
        outputs = variant(*inputs)
        if self.differentiable:
            expect_gradients(outputs, inputs, live)
        return outputs

    def _live(self, inputs: Sequence[Any]) -> Live:
        """Which inputs' gradients are wanted; worked out again only after a call of `train_only`."""
        if self._generation != trained.generation():
            self._live_by_parameters.clear()
            self._generation = trained.generation()
        key = tuple(id(inputs[i]) for i in self.parameter_positions)
        live = self._live_by_parameters.get(key)
        if live is None:
            parameters = [inputs[i] for i in self.parameter_positions]
            trained.enter_region(parameters)
            frozen = {i for i in self.parameter_positions if trained.is_frozen(inputs[i])}
            live = self._live_by_parameters[key] = frozenset(range(len(inputs))) - frozen
        return live

    def _build(self, live: Live) -> Compiled:
        frozen = len(self._example_inputs) - len(live)
        logger.info("compiling a variant with %d of %d parameters frozen", frozen, len(self.parameter_positions))
        with tracing(self._tracing_context), torch.set_grad_enabled(self.differentiable):
            graph = copy.copy(self.graph)
            return compile_specialized(graph, self._example_inputs, live, self.options.compiler)


def _fake_inputs(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What Dynamo traced with: later variants are compiled when the first example inputs are long gone."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)
    ]


class TrainedSetPartitioner(CustomPartitionerFn):  # type: ignore[misc]
    """Rewrites the joint graph for one trained set, then splits it where least is saved for backward.

    Inductor and AOTAutograd keep what they compile on disk under a key that contains `uuid()`, so no trained set is ever
    served the code of another.
    """

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(
        self, graph: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split `graph` into forward and backward for the live gradients."""
        joint = restrict_gradients(region_joint(graph), {input_name(i) for i in self.live})
        forward, backward = min_cut_rematerialization_partition(joint.module, joint_inputs, **kwargs)
        return forward, backward

    def uuid(self) -> tuple[str, tuple[int, ...]]:
        """What the result depends on beside the graph: this code and the trained set."""
        return get_hash_for_files((__file__,)), tuple(sorted(self.live))


def compile_specialized(
    graph: fx.GraphModule, example_inputs: Sequence[Any], live: Live, compiler: Literal["inductor", "eager"]
) -> Compiled:
    """Compile a Dynamo graph so that its backward computes the live gradients alone.

    Args:
        graph: taken over.
        example_inputs: fake tensors and numbers, one per placeholder.
        live: positions of the inputs whose gradients are wanted.
        compiler: who turns the two graphs into code.
    """
    partitioner = TrainedSetPartitioner(live)
    if compiler == "inductor":
        return compile_fx(graph, example_inputs, config_patches={"custom_partitioner_fn": partitioner})  # type: ignore[no-any-return]
    region = aot_autograd(
        fw_compiler=boxed_nop_preserve_node_meta,
        bw_compiler=boxed_nop_preserve_node_meta,
        partition_fn=partitioner,
        keep_inference_input_mutations=True,
    )
    return region(graph, example_inputs)  # type: ignore[no-any-return]


def region_joint(graph: fx.GraphModule) -> JointGraph:
    """The joint graph AOTAutograd made of a region, its slots named by the position of the input."""
    descriptors = graph.graph.output_node().meta["desc"]
    forward_outputs = count_forward_outputs(descriptors)
    slots = tuple(_slot_name(desc) for desc in descriptors[forward_outputs:])
    return JointGraph(module=graph, forward_outputs=forward_outputs, slots=slots, source="region")


def input_name(position: int) -> str:
    """Name of a region's input, and of the slot of its gradient."""
    return f"input {position}"


def _slot_name(descriptor: object) -> str | None:
    if not isinstance(descriptor, GradAOTOutput):
        return None
    source = descriptor.grad_of
    return input_name(source.idx) if isinstance(source, PlainAOTInput) else str(source)


def expect_gradients(outputs: Any, inputs: Sequence[Any], live: Live) -> None:
    """Have the coming backward check, once, that it hands out no gradient for a frozen parameter.

    Raises:
        GraphContractError: from the backward, naming the position of the parameter.
    """
    node = region_node(outputs, inputs)
    if node is None:
        return
    frozen = {id(value): i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter) and i not in live}
    positions = [frozen.get(id(getattr(edge, "variable", None))) for edge, _ in node.next_functions]

    def check(gradients: Sequence[torch.Tensor | None], _: Sequence[torch.Tensor | None]) -> None:
        handle.remove()
        for position, gradient in zip(positions, gradients, strict=True):
            if position is not None and gradient is not None:
                raise GraphContractError(f"the frozen parameter at input {position} of a region got a gradient")

    handle = node.register_hook(check)


def region_node(outputs: Any, inputs: Sequence[Any]) -> torch.autograd.graph.Node | None:
    """The autograd node the region's call made, behind any view of its outputs; None when nothing needs a gradient."""
    before = {value.grad_fn for value in inputs if isinstance(value, torch.Tensor)}
    todo = [value.grad_fn for value in outputs if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    seen = set(before)
    while todo:
        node = todo.pop(0)
        if node.name() == "CompiledFunctionBackward" and node not in before:
            return node
        if node not in seen and node.name() != "CompiledFunctionBackward":
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions if parent is not None)
    return None
