"""Specialized variants: one compilation per set of live gradients, for the best code and least memory."""

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

from torch import fx

from gtcompile.compiler.eager_fallback import UNTRACEABLE, run_as_captured
from gtcompile.compiler.operators import run_operators
from gtcompile.compiler.partitioning import partition
from gtcompile.compiler.region_graph import Live, input_name, region_joint
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
    """Compiles a region anew for every set of live gradients and keeps the most recently used."""

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        compiler: Literal["inductor", "eager"],
        patches: Mapping[str, Any],
        kept: int,
        memory_budget: float,
        compilation: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._graph = graph
        self._example_inputs = example_inputs
        self._compiler = compiler
        self._patches = patches
        self._memory_budget = memory_budget
        self._compilation = compilation
        self._variant = functools.lru_cache(kept)(self._compile)

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        return self._variant(live)(*inputs)

    def compile(self, live: Live) -> None:
        """Make the variant for these gradients, unless it is there."""
        self._variant(live)

    @property
    def kept(self) -> int:
        """How many variants there are now."""
        return self._variant.cache_info().currsize

    def _compile(self, live: Live) -> Compiled:
        logger.info("compiling a variant with %d live inputs", len(live))
        graph = copy.copy(self._graph)
        partitioner = TrainedSetPartitioner(live, self._memory_budget)
        try:
            with self._compilation():
                return compile_specialized(
                    graph, self._example_inputs, partitioner, self._compiler, self._patches
                )
        except UNTRACEABLE as error:
            return run_as_captured(self._graph, live, error)


class TrainedSetPartitioner(CustomPartitionerFn):
    """Rewrites the joint graph for one trained set, then splits it within a budget of memory.

    Inductor and AOTAutograd keep what they compile on disk under a key that contains `uuid()`, so no trained
    set is ever served the code of another.
    """

    def __init__(self, live: Live, memory_budget: float) -> None:
        self.live = live
        self.memory_budget = memory_budget

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward for the live gradients."""
        joint = restrict_gradients(region_joint(gm), {input_name(i) for i in self.live})
        return partition(joint.module, joint_inputs, self.memory_budget, **kwargs)

    def uuid(self) -> tuple[bytes, tuple[int, ...], float]:
        """What the result depends on beside the graph: this code, the trained set and the budget."""
        return get_hash_for_files((__file__,)), tuple(sorted(self.live)), self.memory_budget


def compile_specialized(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: TrainedSetPartitioner,
    compiler: Literal["inductor", "eager"],
    patches: Mapping[str, Any],
) -> Compiled:
    """Compile a Dynamo graph so that its backward computes the live gradients alone.

    Args:
        graph: taken over.
        example_inputs: fake tensors and numbers, one per placeholder.
        partitioner: knows the inputs whose gradients are wanted.
        compiler: who turns the two graphs into code.
        patches: of Inductor's settings.
    """
    code: Any
    if compiler == "inductor":
        settings = {**patches, "custom_partitioner_fn": partitioner}
        code = compile_fx(graph, example_inputs, config_patches=settings)
    else:
        code = aot_autograd(
            fw_compiler=run_operators,
            bw_compiler=run_operators,
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )(graph, example_inputs)
    return cast(Compiled, code)
