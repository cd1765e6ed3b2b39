"""Specialized variants: one compilation per set of live gradients, for the best code and least memory."""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx

from gtcompile.compiler.captured_region import CapturedRegion
from gtcompile.compiler.eager_fallback import UNTRACEABLE, run_as_captured
from gtcompile.compiler.hoisted import HoistedVariants
from gtcompile.compiler.operators import run_operators
from gtcompile.compiler.partitioning import partition
from gtcompile.compiler.region_graph import Live, histories, input_name, region_joint
from gtcompile.compiler.unused_outputs import UnusedOutputs
from gtcompile.passes.effect_tokens import EFFECTS, drop_unneeded_checks
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    aot_autograd,
    compile_fx,
    get_hash_for_files,
)

logger = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class SpecializedVariants:
    """Compiles a region anew for every set of live gradients and keeps the most recently used variants.

    A specialized backward runs zeros back through outputs that nobody differentiates. Where the first
    backward shows that this costs FLOPs, a hoisted variant takes over: it sees at every backward which
    outputs are differentiated.
    """

    def __init__(self, region: CapturedRegion) -> None:
        self._region = region
        self._variant = functools.lru_cache(region.options.variants_kept)(self._compile)
        self._unused_outputs = UnusedOutputs(region.graph)

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        if self._unused_outputs.costly:
            return self._hoisted(live, inputs)
        if not self._unused_outputs.unknown:
            return self._variant(live)(*inputs)
        before = histories(inputs)
        outputs = self._variant(live)(*inputs)
        self._unused_outputs.watch(outputs, before)
        return outputs

    def prepare(self, live: Live) -> None:
        """Compile the variant for these gradients, unless it is there."""
        self._variant(live)

    @property
    def kept(self) -> int:
        """How many variants are kept now."""
        return self._variant.cache_info().currsize

    @functools.cached_property
    def _hoisted(self) -> HoistedVariants:
        with self._region.compilation():
            return HoistedVariants(self._region)

    def _compile(self, live: Live) -> Compiled:
        logger.info("compiling a variant with %d live inputs", len(live))
        memory_budget = self._region.options.activation_memory_budget
        try:
            with self._region.compilation():
                return compile_specialized(self._region, TrainedSetPartitioner(live, memory_budget))
        except UNTRACEABLE as error:
            return run_as_captured(self._region.graph, live, error)


class TrainedSetPartitioner(CustomPartitionerFn):
    """Rewrites the joint graph for one trained set, then splits it into forward and backward.

    Inductor and AOTAutograd keep what they compile on disk under a key that contains `uuid()`, so that no
    trained set is ever served the code of another.
    """

    def __init__(self, live: Live, memory_budget: float) -> None:
        self.live = live
        self.memory_budget = memory_budget

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward for the live gradients."""
        keep = {input_name(i) for i in self.live}
        joint = drop_unneeded_checks(region_joint(gm), keep)
        joint = restrict_gradients(joint, keep | {EFFECTS})
        return partition(joint.module, joint_inputs, self.memory_budget, **kwargs)

    def uuid(self) -> tuple[bytes, tuple[int, ...], float]:
        """Return all that the result depends on apart from the graph: this code, the set and the budget."""
        return get_hash_for_files((__file__,)), tuple(sorted(self.live)), self.memory_budget


def compile_specialized(region: CapturedRegion, partitioner: TrainedSetPartitioner) -> Compiled:
    """Compile a region so that its backward computes the live gradients alone.

    Args:
        region: what to compile, and how.
        partitioner: knows the inputs whose gradients are wanted.
    """
    graph, inputs = copy.copy(region.graph), list(region.example_inputs)
    code: Any
    if region.options.compiler == "inductor":
        settings = {**region.inductor_settings, "custom_partitioner_fn": partitioner}
        code = compile_fx(graph, inputs, config_patches=settings)
    else:
        code = aot_autograd(
            fw_compiler=run_operators,
            bw_compiler=run_operators,
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )(graph, inputs)
    return cast(Compiled, code)
