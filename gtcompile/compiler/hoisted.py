"""Hoisted variants: one compilation serves every set of live gradients.

AOTAutograd traces and partitions the region once, with every gradient live. For every set of live gradients a
*plan* (`plans.py`) says which saved values the forward may let go, and what the backward runs.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import fx

from gtcompile.compiler.autograd_nodes import histories, region_node
from gtcompile.compiler.backward_plans import Plan, PlanOptions, Plans
from gtcompile.compiler.inductor import InductorParts, resumable_compilation, without_donation
from gtcompile.compiler.operators import Boxed, boxed, run_operators
from gtcompile.compiler.partitioning import HoistingPartitioner
from gtcompile.compiler.region_graph import Live, input_name
from gtcompile.passes.onednn_products import use_onednn_products
from gtcompile.torch_internals import (
    aot_autograd,
    compile_fx,
    compile_fx_inner,
    current_autograd_node,
    innermost_fn,
)

PLAN = "gtcompile.plan"
"""Key of the plan in the metadata of a region's autograd node."""

LIVE = "gtcompile.live"
"""The same of the set of live gradients."""

ZERO = "gtcompile.zero"
"""The same of the tangents that are zero because nothing was differentiated through their outputs."""


class NoBackwardError(Exception):
    """A region computes nothing that could be differentiated: where tokens go, say, and its own inputs."""


class HoistedVariants:
    """One compilation of a region, and a plan for each set of live gradients it was asked for.

    Raises:
        NoBackwardError: there is no backward.
    """

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
        self._patches = patches
        self._activations = [i for i in range(len(example_inputs)) if i not in parameters]
        self._current = threading.local()
        self._parts: InductorParts | None = None
        partitioner = HoistingPartitioner(memory_budget)
        with without_donation():
            compile_region = self._generate_code if compiler == "inductor" else self._take_operators
            code = compile_region(graph, example_inputs, partitioner)
        self._code = innermost_fn(code)  # regions run where Dynamo is disabled already
        if partitioner.partition is None:
            raise NoBackwardError
        partition = partitioner.partition
        if compiler == "inductor":
            backward = use_onednn_products(partition.backward)
            partition = dataclasses.replace(partition, backward=backward)
        self._tangents = partition.tangents
        options = PlanOptions(
            parts=self._parts,
            parameters=frozenset(map(input_name, parameters)),
            inputs=frozenset(map(input_name, range(len(example_inputs)))),
            cut_chains=cut_chains,
            beside=beside,
        )
        self._plans = Plans(partition, options)
        self._plans.compile_chain()

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        plan = self._current.plan = self._plans.of(live)
        before = histories([inputs[i] for i in self._activations])
        outputs = self._code(*inputs)
        node = region_node(outputs, before)
        if node is not None:
            metadata: Any = node.metadata
            metadata[PLAN], metadata[LIVE] = plan, live
            if len(self._tangents) > 1:
                node.register_prehook(functools.partial(_note_zero, metadata, self._tangents))
        return outputs

    def _generate_code(
        self, graph: fx.GraphModule, example_inputs: Sequence[Any], partitioner: HoistingPartitioner
    ) -> Callable[..., Any]:
        patches: dict[str, Any] = {**self._patches, "custom_partitioner_fn": partitioner}
        code: Any = compile_fx(graph, example_inputs, inner_compile=self._inductor, config_patches=patches)
        return cast("Callable[..., Any]", code)

    def _take_operators(
        self, graph: fx.GraphModule, example_inputs: Sequence[Any], partitioner: HoistingPartitioner
    ) -> Callable[..., Any]:
        compile_region: Any = aot_autograd(
            fw_compiler=lambda module, inputs: self._forward(run_operators(module)),
            bw_compiler=lambda module, inputs: boxed(self._run_plan),
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )
        return cast("Callable[..., Any]", compile_region(graph, example_inputs))

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
        if zero and (plans := self._plans.without(zero)) is not None:
            plan = plans.within(metadata[LIVE], plan.released)
        return plan.backward(inputs)


def _note_zero(
    metadata: dict[str, Any], tangents: Mapping[int, int | None], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Note, before a backward runs, which of its tangents autograd has no gradient for."""
    of_outputs = ((i, output) for i, output in tangents.items() if output is not None)
    metadata[ZERO] = frozenset(i for i, output in of_outputs if gradients[output] is None)
