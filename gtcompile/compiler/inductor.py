"""Compile parts of a hoisted region's backward with Inductor: when asked for, or beside the training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from gtcompile.compiler.background import Compilation, compile_beside
from gtcompile.compiler.operators import Boxed
from gtcompile.errors import GraphContractError
from gtcompile.passes.hoisting import Part
from gtcompile.torch_internals import (
    CustomPartitionerFn,
    TracingContext,
    compile_fx_inner,
    functorch_config,
    has_free_symbols,
    inductor_config,
    inductor_state,
    no_autocast,
    tracing,
)


class NothingDonated(CustomPartitionerFn):
    """Partitions nothing, for parts are; tells Inductor's cache that their code overwrites no input.

    It has no state: Inductor's key is made of its bytes, which must be the same in every process.
    """

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Never called.

        Raises:
            GraphContractError: a part has a joint graph.
        """
        raise GraphContractError("a part of a backward was about to be split into forward and backward")

    def uuid(self) -> str:
        """The same for all parts."""
        return "nothing donated"


@dataclass(frozen=True, slots=True)
class InductorParts:
    """How Inductor compiles parts of one backward graph, long after its forward was compiled."""

    example_inputs: Sequence[Any]
    """Of the backward graph, fake tensors and numbers."""
    options: Mapping[str, Any]
    """Keyword arguments of `compile_fx_inner`."""
    settings: Mapping[str, Any]
    """Of Inductor, beside that nothing is donated."""
    resume: Callable[[], contextlib.AbstractContextManager[None]]
    """Enters the compilation of the forward again."""

    def compile(self, part: Part) -> Boxed:
        """From the inputs that the part reads to its outputs; code on the disk is taken from there."""
        mark_outputs_visible(part.module)
        with self.resume(), inductor_config.patch(self._settings):
            return cast(Boxed, compile_fx_inner(part.module, self._inputs(part), **self._options(part)))

    def compile_beside(self, part: Part) -> Compilation | None:
        """Have another process put the part's code on the disk, unless it is busy."""
        mark_outputs_visible(part.module)
        return compile_beside(part.module, self._inputs(part), self._options(part), self._settings)

    @property
    def static(self) -> bool:
        """Whether all sizes are known; others are guarded, and another process knows no guards."""
        return not any(map(has_free_symbols, self.example_inputs))

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.settings, "custom_partitioner_fn": NothingDonated()}

    def _inputs(self, part: Part) -> list[Any]:
        return [self.example_inputs[i] for i in part.inputs]

    def _options(self, part: Part) -> dict[str, Any]:
        return {**self.options, "static_input_idxs": range(len(part.inputs))}


def run_part(positions: Sequence[int], run: Boxed, inputs: list[Any]) -> Sequence[Any]:
    """Run a part on those of the backward graph's inputs that it reads; all are let go."""
    own = [inputs[i] for i in positions]
    inputs.clear()
    return run(own)


def mark_outputs_visible(module: fx.GraphModule) -> None:
    """Have Inductor keep the strides of all outputs: leaves and autograd read them."""
    output = module.graph.output_node()
    outputs: Any = output.args[0]
    output.meta["user_visible_output_idxs"] = [i for i, node in enumerate(outputs) if node is not None]


@contextlib.contextmanager
def without_donation() -> Iterator[None]:
    """Compile code that never overwrites saved values: leaves read them afterwards (`TORCH.md`, 16).

    AOTAutograd's cache is left out, for its key does not know; Inductor's does, through the partitioner's
    `uuid`. The backward is compiled with the forward, so that no later set has to.
    """
    settings = dict.fromkeys(("donated_buffer", "enable_autograd_cache"), False)
    with functorch_config.patch({**settings, "force_non_lazy_backward_lowering": True}):
        yield
    metadata: Any = TracingContext.get().fw_metadata
    metadata.bw_donated_idxs = []  # None would have AOTAutograd refuse to retain the graph


def resumable_compilation() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Remember the compilation under way; what is returned enters it again later."""
    context, fake_mode = TracingContext.get(), inductor_state.fake_mode

    @contextlib.contextmanager
    def resume() -> Iterator[None]:
        with (
            tracing(context),
            torch.no_grad(),
            no_autocast(),
            inductor_state.set_fake_mode(fake_mode),
            without_donation(),
        ):
            yield

    return resume
