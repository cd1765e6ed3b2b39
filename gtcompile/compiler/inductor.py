"""Code that Inductor compiles for a region, apart from its specialized variants.

Two things are compiled here: the forward for calls that need no gradient, and *parts* of a hoisted region's
backward. Parts are difficult, because most are compiled after the compilation of the region has ended:

    Dynamo's graph --- compile_fx ---> AOTAutograd ---> partitioner
                                                         |- forward  ---> compile_fx_inner ---> code
                                                         `- backward ---> kept as a graph
                                                                            |
      now, or in the backward of some later step:                          part
                       resumable_compilation() ---> compile_fx_inner ---> code

`compile_fx_inner` expects to run inside `compile_fx`. So the state of the first compilation is restored:

* the tracing context and the fake mode of the region, to which symbolic sizes belong;
* no gradients and no autocast: AOTAutograd has traced both already;
* Inductor's settings of the region, with a partitioner that is never called and only changes the cache key;
* no donation.

Donation: AOTAutograd marks the values saved for the backward as *donated*, because nobody else holds them,
and Inductor's backward then overwrites them. A hoisted leaf reads saved values after the compiled chain has
run; with donation it would read overwritten memory, and gradients would be wrong without any error. So
donation is off. Inductor's disk cache must not return code that was compiled with donation: the
partitioner's `uuid` is part of its key. AOTAutograd's cache has no such key, so it is off.
"""

import contextlib
import contextvars
import copy
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import fx

from gtcompile.compiler.captured_region import UNTRACEABLE, CapturedRegion, run_as_captured
from gtcompile.compiler.operator_program import Boxed
from gtcompile.errors import GraphContractError
from gtcompile.graph.joint_graph import copy_module
from gtcompile.passes.hoisting import Part
from gtcompile.torch_internals import (
    STATIC_INPUTS,
    VISIBLE_OUTPUTS,
    CustomPartitionerFn,
    TracingContext,
    cache_dir,
    compile_fx,
    compile_fx_inner,
    functorch_config,
    inductor_config,
    inductor_state,
    innermost_fn,
    no_autocast,
    tracing,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
UNREADABLE = re.compile(
    r"(/[^\s:]+\.s?o): (?:file too short|invalid ELF header|cannot read file data|file not recognized)"
)
"""How loader and linker report a shared object, or an object file, that was not written to its end."""


def despite_damaged_files(compile_code: Callable[[], T]) -> T:
    """Compile with Inductor; if its cache holds an unfinished file, delete the file and compile again.

    A process that is killed while the C++ compiler writes leaves such a file, and Inductor takes any file
    that exists for finished.

    Args:
        compile_code: called again after a file was deleted; each file is deleted once.
    """
    deleted: set[Path] = set()
    while True:
        try:
            return compile_code()
        except Exception as error:
            damaged = damaged_files(error) - deleted
            if not damaged:
                raise
        for path in damaged:
            logger.warning("%s was not written to its end; it is deleted and compiled again", path)
            path.unlink(missing_ok=True)
            _forget_module(path)
        deleted |= damaged


def damaged_files(error: BaseException | None) -> set[Path]:
    """The unfinished files in Inductor's cache that an error, or what caused it, names."""
    if error is None:
        return set()
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    named = set(map(Path, UNREADABLE.findall(str(error))))
    return {path for path in named if path.is_relative_to(cache_dir())} | damaged_files(cause)


def _forget_module(path: Path) -> None:
    """Remove what a failed import left behind; Inductor would take it for the loaded module."""
    for name, module in list(sys.modules.items()):
        if getattr(getattr(module, "__spec__", None), "origin", None) == str(path):
            del sys.modules[name]


def compile_frozen(region: CapturedRegion) -> Callable[..., Any]:
    """Compile the forward for calls that need no gradient: without autograd, with nothing saved for backward.

    The `eager` compiler runs the graph as Dynamo captured it.

    Returns:
        A function of the graph's inputs whose outputs do not require grad.
    """
    run: Any = fx.GraphModule(region.graph, region.graph.graph)  # makes its Python code now, not at a call
    if region.options.compiler == "inductor":
        graph, inputs, settings = run, region.example_inputs, region.inductor_settings
        try:
            with torch.no_grad():
                run = despite_damaged_files(
                    lambda: compile_fx(copy.copy(graph), list(inputs), config_patches=settings)
                )
        except UNTRACEABLE as error:
            run = run_as_captured(region.graph, frozenset(), error)
    run = innermost_fn(run)  # regions run where Dynamo is disabled already

    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            outputs = run(*inputs)
        return [_writable(output) for output in outputs]

    return forward


def _writable(output: Any) -> Any:
    """Return an output that may be written to, which autograd forbids for views made without it."""
    return output.data if isinstance(output, torch.Tensor) and output._is_view() else output


@dataclass(frozen=True, slots=True)
class InductorParts:
    """Compiles parts of one backward graph with Inductor, at any later time."""

    example_inputs: Sequence[Any]
    """Fake tensors and numbers, one per input of the whole backward graph."""
    options: Mapping[str, Any]
    """Keyword arguments of `compile_fx_inner` for the whole backward graph."""
    settings: Mapping[str, Any]
    """Inductor's settings for the region."""
    resume: Callable[[], contextlib.AbstractContextManager[None]]
    """Restores the state of the region's compilation."""
    variables: contextvars.Context = field(default_factory=contextvars.copy_context)
    """Context variables of the region's compilation: torch keeps the user's settings in them. Every thread
    has its own, and on a GPU the backward runs in another thread."""

    def compile(self, part: Part) -> Boxed:
        """Compile a part to a function of the inputs that it reads, or take it from Inductor's disk cache."""
        return self.variables.copy().run(self._compile, part)

    def _compile(self, part: Part) -> Boxed:
        keep_output_strides(part.module)
        inputs = [self.example_inputs[i] for i in part.inputs]
        settings = {**self.settings, "custom_partitioner_fn": NothingDonated()}
        with self.resume(), inductor_config.patch(settings):
            options = self._options(part)
            code = despite_damaged_files(
                lambda: compile_fx_inner(copy_module(part.module), inputs, **options)
            )
        return cast(Boxed, code)

    def _options(self, part: Part) -> dict[str, Any]:
        # Saved values have fixed addresses, tangents do not: they may be views at any offset.
        fixed = set(self.options[STATIC_INPUTS])
        return {**self.options, STATIC_INPUTS: [k for k, i in enumerate(part.inputs) if i in fixed]}


class NothingDonated(CustomPartitionerFn):
    """Tells Inductor's cache that the code of a part overwrites none of its inputs; it partitions nothing.

    It has no state: Inductor's key contains its bytes, which must be the same in every process.
    """

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Never called, since a part has no joint graph.

        Raises:
            GraphContractError: always.
        """
        raise GraphContractError("a part of a backward was about to be split into forward and backward")

    def uuid(self) -> str:
        """Return the same key for all parts."""
        return "nothing donated"


def run_part(positions: Sequence[int], run: Boxed, inputs: list[Any]) -> Sequence[Any]:
    """Run a part on those of the backward graph's inputs that it reads; `inputs` is emptied."""
    own = [inputs[i] for i in positions]
    inputs.clear()
    return run(own)


def keep_output_strides(module: fx.GraphModule) -> None:
    """Make Inductor keep the strides of all outputs: leaves and autograd were traced with them."""
    output = module.graph.output_node()
    outputs: Any = output.args[0]
    output.meta[VISIBLE_OUTPUTS] = [i for i, node in enumerate(outputs) if node is not None]


@contextlib.contextmanager
def without_donation() -> Iterator[None]:
    """Compile code that never overwrites saved values, and the backward together with the forward.

    The module's docstring gives the reasons. The backward is compiled now, so that no later set compiles it.
    """
    settings = {
        "donated_buffer": False,
        "enable_autograd_cache": False,
        "force_non_lazy_backward_lowering": True,
    }
    with functorch_config.patch(settings):
        yield
    metadata: Any = TracingContext.get().fw_metadata
    # Positions of donated saved values. With None, AOTAutograd would refuse `backward(retain_graph=True)`.
    metadata.bw_donated_idxs = []


def resumable_compilation() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Keep the state of the compilation under way; the returned function restores it later."""
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
