"""Specialized variants: one compilation per set of live gradients, for the best code and least memory."""

import copy
import functools
import logging
from collections.abc import Callable, Sequence, Set
from typing import Any, cast

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from gtcompile.compiler.captured_region import UNTRACEABLE, CapturedRegion, run_as_captured
from gtcompile.compiler.hoisted import HoistedVariants
from gtcompile.compiler.inductor import despite_damaged_files
from gtcompile.compiler.operator_program import run_operators
from gtcompile.compiler.partitioning import (
    BackwardWritesError,
    NotHoistableError,
    SavedMemory,
    partition,
    refuse_backward_writes,
)
from gtcompile.compiler.region_graph import (
    DifferentiableFlow,
    Histories,
    Live,
    gradient_positions,
    histories,
    input_name,
    region_joint,
    region_node,
)
from gtcompile.graph.flop_registry import register_missing_formulas
from gtcompile.passes.effect_tokens import EFFECTS, drop_unneeded_checks
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    aot_autograd,
    compile_fx,
    functorch_config,
    get_hash_for_files,
)

logger = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class SpecializedVariants:
    """Compiles a region anew for every set of live gradients and keeps the most recently used variants.

    A specialized backward computes with zero gradients for outputs that the loss does not use. If the first
    backward shows that this costs FLOPs, a hoisted variant takes over, which leaves out zero gradients. Where
    none is possible, the graph runs uncompiled from then on.
    """

    def __init__(self, region: CapturedRegion) -> None:
        self._region = region
        self._variant = functools.lru_cache(region.options.variants_kept)(self._compile)
        self._unused_outputs = UnusedOutputs(region.graph)

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        if self._unused_outputs.costly:
            return self._without_zero_gradients(live, inputs)
        if not self._unused_outputs.unknown:
            return self._variant(live)(*inputs)
        before = histories(inputs)
        outputs = self._variant(live)(*inputs)
        self._unused_outputs.watch(outputs, before)
        return outputs

    def prepare(self, live: Live) -> None:
        """Compile the variant for these gradients, unless it is kept."""
        self._variant(live)

    @property
    def kept(self) -> int:
        """How many variants are kept now."""
        return self._variant.cache_info().currsize

    @functools.cached_property
    def _without_zero_gradients(self) -> Callable[[Live, Sequence[Any]], Any]:
        """Hoisted variants; if one compilation cannot serve every set, the graph as Dynamo captured it."""
        graph = self._region.graph
        try:
            with self._region.compilation():
                return HoistedVariants(self._region)
        except NotHoistableError as error:
            reason = error
        captured = functools.cache(lambda live: run_as_captured(graph, live, reason))
        return lambda live, inputs: captured(live)(*inputs)

    def _compile(self, live: Live) -> Compiled:
        logger.info("compiling a variant with %d live inputs", len(live))
        partitioner = TrainedSetPartitioner(live, self._region.saved_memory)
        try:
            with self._region.compilation():
                return compile_specialized(self._region, partitioner)
        except (*UNTRACEABLE, BackwardWritesError) as error:
            return run_as_captured(self._region.graph, live, error)


class TrainedSetPartitioner(CustomPartitionerFn):
    """Rewrites the joint graph for one trained set, then splits it into forward and backward.

    Inductor and AOTAutograd keep what they compile on disk under a key that contains `uuid()`, so that no
    trained set is ever served the code of another.
    """

    def __init__(self, live: Live, memory: SavedMemory) -> None:
        self.live = live
        self.memory = memory

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward for the live gradients.

        Raises:
            BackwardWritesError: the backward writes to an input.
        """
        refuse_backward_writes(gm)
        keep = {input_name(i) for i in self.live}
        joint = drop_unneeded_checks(region_joint(gm), keep)
        joint = restrict_gradients(joint, keep | {EFFECTS})
        return partition(joint.module, joint_inputs, self.memory, **kwargs)

    def uuid(self) -> tuple[bytes, tuple[int, ...], str]:
        """Return what the result depends on apart from the graph: this code, the set and the memory."""
        return get_hash_for_files((__file__,)), tuple(sorted(self.live)), str(self.memory)


def compile_specialized(region: CapturedRegion, partitioner: TrainedSetPartitioner) -> Compiled:
    """Compile a region so that its backward computes the live gradients alone.

    Args:
        region: what to compile, and how.
        partitioner: of the live gradients.
    """
    code: Any
    if region.options.compiler == "inductor":
        settings = {**region.inductor_settings, "custom_partitioner_fn": partitioner}
        # AOTAutograd would put off an error in the backward's compilation until the backward runs
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            code = despite_damaged_files(
                lambda: compile_fx(
                    copy.copy(region.graph), list(region.example_inputs), config_patches=settings
                )
            )
    else:
        code = aot_autograd(
            fw_compiler=run_operators,
            bw_compiler=run_operators,
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )(copy.copy(region.graph), list(region.example_inputs))
    return cast(Compiled, code)


class UnusedOutputs:
    """Learns from the first backward of a region whether zero gradients cost FLOPs.

    AOTAutograd's backward takes a gradient for every output, zeros for outputs that the loss does not use. If
    a block returns a state that nobody reads, its zeros run back through matrix products. Only a backward
    shows which outputs are used.

    Args:
        graph: of the region, as Dynamo captured it.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        outputs: Any = graph.graph.output_node().args[0]
        self.unknown = len(outputs) > 1
        """Whether no backward has run yet."""
        self.costly = False
        """Whether zero gradients for unused outputs cost FLOPs."""

    def watch(self, outputs: Sequence[Any], before: Histories) -> None:
        """Learn from the backward of this call.

        Args:
            outputs: of the call.
            before: the histories of its inputs before the call.
        """
        node = region_node(outputs, before)
        if node is None:
            return
        positions = gradient_positions(outputs, node)

        def note(gradients: Sequence[torch.Tensor | None]) -> None:
            if self.unknown:
                self.unknown = False
                used = {i for i, position in positions.items() if gradients[position] is not None}
                self.costly = zeros_cost_flops(self._graph, used)

        node.register_prehook(note)


def zeros_cost_flops(graph: fx.GraphModule, differentiated: Set[int]) -> bool:
    """Whether zero gradients for the unused outputs of a graph would run back through matrix products.

    Args:
        graph: as Dynamo captured it, with an `example_value` at every node.
        differentiated: positions of the outputs for which a backward has gradients.
    """
    outputs: Any = graph.graph.output_node().args[0]
    flow = DifferentiableFlow(graph.graph)
    used = flow.ancestors(outputs[i] for i in differentiated)
    unused = flow.ancestors(node for node in outputs if isinstance(node, fx.Node)) - used
    register_missing_formulas()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            for node in (n for n in graph.graph.nodes if n in unused and n.op.startswith("call_")):
                _call(graph, node)
    except Exception as error:  # an operator that cannot be called by itself may cost something
        logger.info("unused outputs of a region depend on %s, of unknown cost: %s", node.target, error)
        return True
    return counter.get_total_flops() > 0


def _call(graph: fx.GraphModule, node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
    if node.op == "call_method":
        getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif callable(node.target):
        node.target(*args, **kwargs)
    else:
        graph.get_submodule(str(node.target))(*args, **kwargs)
