"""Specialized variants: one compilation per set of live gradients, for the best code and least memory."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import fx

from gtcompile.operators import run_operators
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.region_graph import Live, input_name, region_joint
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    aot_autograd,
    compile_fx,
    get_hash_for_files,
    min_cut_rematerialization_partition,
)

logger = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class SpecializedVariants:
    """Compiles a region anew for every set of live gradients and keeps the most recently used."""

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any],
        compiler: Literal["inductor", "eager"],
        kept: int,
    ) -> None:
        self._graph = graph
        self._example_inputs = example_inputs
        self._compiler = compiler
        self._kept = kept
        self._variants: OrderedDict[Live, Compiled] = OrderedDict()

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        variant = self._variants.get(live)
        if variant is None:
            logger.info("compiling a variant with %d live inputs", len(live))
            graph = copy.copy(self._graph)
            variant = compile_specialized(graph, self._example_inputs, live, self._compiler)
            self._variants[live] = variant
            if len(self._variants) > self._kept:
                self._variants.popitem(last=False)
        else:
            self._variants.move_to_end(live)
        return variant(*inputs)


class TrainedSetPartitioner(CustomPartitionerFn):
    """Rewrites the joint graph for one trained set, then splits it where least is saved for backward.

    Inductor and AOTAutograd keep what they compile on disk under a key that contains `uuid()`, so no trained
    set is ever served the code of another.
    """

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph into forward and backward for the live gradients."""
        joint = restrict_gradients(region_joint(gm), {input_name(i) for i in self.live})
        forward, backward = min_cut_rematerialization_partition(joint.module, joint_inputs, **kwargs)
        return forward, backward

    def uuid(self) -> tuple[bytes, tuple[int, ...]]:
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
    code: Any
    if compiler == "inductor":
        code = compile_fx(graph, example_inputs, config_patches={"custom_partitioner_fn": partitioner})
    else:
        code = aot_autograd(
            fw_compiler=run_operators,
            bw_compiler=run_operators,
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )(graph, example_inputs)
    return cast(Compiled, code)
