"""Hoisted variants: one compilation serves every set of live gradients.

AOTAutograd traces and partitions the region once, with every gradient live. For each set of live gradients
`backward_plans.py` says which saved values the forward may release, and what the backward runs.
"""

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from gtcompile.compiler.backward_plans import BackwardPlans, PlanOptions
from gtcompile.compiler.captured_region import CapturedRegion
from gtcompile.compiler.inductor import (
    InductorParts,
    despite_damaged_files,
    resumable_compilation,
    without_donation,
)
from gtcompile.compiler.operator_program import Boxed, boxed, run_operators
from gtcompile.compiler.partitioning import HoistingPartitioner
from gtcompile.compiler.region_graph import Live, histories, region_node
from gtcompile.passes.onednn_products import use_onednn_products
from gtcompile.torch_internals import (
    IS_BACKWARD,
    aot_autograd,
    compile_fx,
    compile_fx_inner,
    current_autograd_node,
    innermost_fn,
)

# Keys in the metadata of the autograd node of a region's call. Each call stores there what its own backward
# needs: several calls may be waiting for their backward, and recomputation runs them in any order.
LIVE = "gtcompile.live"
"""The set of live gradients of the call."""
RELEASED = "gtcompile.released"
"""The saved values that its forward released."""
ZERO_TANGENTS = "gtcompile.zero_tangents"
"""The tangents that are zero because nothing was differentiated through their outputs."""
NO_TANGENTS: frozenset[int] = frozenset()


class NoBackwardError(Exception):
    """A region computes nothing differentiable: it returns its inputs, for example, or integers."""


class HoistedVariants:
    """One compilation of a region, and a plan for each set of live gradients.

    Raises:
        NoBackwardError: there is no backward.
    """

    def __init__(self, region: CapturedRegion) -> None:
        self._region = region
        self._activations = sorted(set(range(len(region.example_inputs))) - set(region.parameters))
        self._current = threading.local()
        self._computed: int | None = None
        """Position of an output whose history begins with the node of the call; None until one is known."""
        self._parts: InductorParts | None = None
        partitioner = HoistingPartitioner(region.saved_memory)
        inductor = region.options.compiler == "inductor"
        with without_donation():
            code = self._generate_code(partitioner) if inductor else self._take_operators(partitioner)
        self._code = innermost_fn(code)  # regions run where Dynamo is disabled already
        if partitioner.partition is None:
            raise NoBackwardError
        partition = partitioner.partition
        if inductor:
            partition = dataclasses.replace(partition, backward=use_onednn_products(partition.backward))
        self._tangents = partition.tangents
        self._plans = BackwardPlans(partition, PlanOptions.of(region, self._parts))

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""
        released = self._current.released = self._plans.released(live)
        node, outputs = self._run(inputs)
        if node is not None:
            metadata: Any = node.metadata
            metadata[LIVE], metadata[RELEASED] = live, released
            if len(self._tangents) > 1:
                node.register_prehook(functools.partial(_note_zero_tangents, metadata, self._tangents))
        return outputs

    def _run(self, inputs: Sequence[Any]) -> tuple[torch.autograd.graph.Node | None, Sequence[Any]]:
        """Run the code; find the autograd node of the call, in later calls by an output that it computes.

        Which outputs are inputs or views of them is the same in every call of one compiled graph.
        """
        if self._computed is not None:
            outputs = self._code(*inputs)
            return outputs[self._computed].grad_fn, outputs
        before = histories([inputs[i] for i in self._activations])
        outputs = self._code(*inputs)
        node = region_node(outputs, before)
        if node is not None:
            own = (
                i for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and out.grad_fn is node
            )
            self._computed = next(own, None)
        return node, outputs

    def prepare(self, live: Live) -> None:
        """Compile nothing: one compilation, done by now, serves every set."""

    def _generate_code(self, partitioner: HoistingPartitioner) -> Callable[..., Any]:
        settings = {**self._region.inductor_settings, "custom_partitioner_fn": partitioner}
        how: dict[str, Any] = {"inner_compile": self._inductor, "config_patches": settings}
        region = self._region
        code: Any = despite_damaged_files(
            lambda: compile_fx(copy.copy(region.graph), list(region.example_inputs), **how)
        )
        return cast("Callable[..., Any]", code)

    def _take_operators(self, partitioner: HoistingPartitioner) -> Callable[..., Any]:
        compile_region: Any = aot_autograd(
            fw_compiler=lambda module, inputs: self._forward(run_operators(module)),
            bw_compiler=lambda module, inputs: boxed(self._run_backward),
            partition_fn=partitioner,
            keep_inference_input_mutations=True,
        )
        code = compile_region(copy.copy(self._region.graph), list(self._region.example_inputs))
        return cast("Callable[..., Any]", code)

    def _inductor(self, module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """Serve as Inductor's `inner_compile`: compile the forward; for the backward, keep the arguments."""
        if not options.get(IS_BACKWARD):
            return self._forward(compile_fx_inner(module, example_inputs, **options))
        settings = self._region.inductor_settings
        self._parts = InductorParts(example_inputs, options, settings, resumable_compilation())
        return boxed(self._run_backward)

    def _forward(self, compiled: Callable[[list[Any]], Any]) -> Boxed:
        """Wrap the compiled forward so that it frees the saved values that the backward will not read."""
        nothing: dict[int, torch.Tensor] = {}  # by position of a saved value, what is saved in its place

        def forward(inputs: list[Any]) -> Sequence[Any]:
            outputs = list(compiled(inputs))
            for position in self._current.released:
                if position not in nothing:
                    nothing[position] = outputs[position].new_empty(0)
                outputs[position] = nothing[position]
            return outputs

        return boxed(forward)

    def _run_backward(self, inputs: list[Any]) -> Sequence[Any]:
        metadata: Any = current_autograd_node().metadata
        zero = metadata.get(ZERO_TANGENTS, NO_TANGENTS)
        return self._plans.backward(metadata[LIVE], zero, metadata[RELEASED])(inputs)


def _note_zero_tangents(
    metadata: dict[str, Any], tangents: Mapping[int, int | None], gradients: Sequence[torch.Tensor | None]
) -> None:
    """Note, before a backward runs, for which of its tangents autograd has no gradient."""
    of_outputs = ((i, output) for i, output in tangents.items() if output is not None)
    metadata[ZERO_TANGENTS] = frozenset(i for i, output in of_outputs if gradients[output] is None)
