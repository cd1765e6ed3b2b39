"""Strategies for tracing a model and a batch, in the order in which they are tried."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gtcompile.capture.forced_gradients import trace_forced_gradients
from gtcompile.capture.pristine_model import attributes_kept
from gtcompile.capture.recorded_reads import RecordingMode, ReplayMode
from gtcompile.capture.rng import random_state, restore_random_state
from gtcompile.capture.value_tracing import NoMemoryAccess, ValuesMode
from gtcompile.graph.joint_graph import ONE_BATCH
from gtcompile.torch_internals import (
    TRACING_CONTEXT,
    FakeTensor,
    TracingContext,
    as_if_compiling,
    captured_as_compiled,
    dynamo_config,
    dynamo_graph_capture_for_export,
    eager_lstm_kernels,
    is_traceable_wrapper_subclass,
    reentrant_checkpoints_as_calls,
    settings_not_logged,
    tracing,
    tree_map,
)

DYNAMO = "dynamo"
"""`JointGraph.source` of a graph that Dynamo captured without a graph break."""
EAGER = "eager trace"
"""`JointGraph.source` of a graph that was traced operator by operator, across graph breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to trace a model and a batch."""

    name: str
    """`JointGraph.source` of the graphs that it captures."""
    sentence: str
    """Description for the error message that lists every strategy that failed."""
    run: Callable[[nn.Module, dict[str, Any], contextlib.ExitStack], nn.Module]
    """Takes the `LossModule`, the batch by name, and a stack on which it enters the contexts for tracing.
    Returns the module that AOTAutograd is to trace."""


def strategies(model: nn.Module, batch: Mapping[str, Any], tensors: Iterable[torch.Tensor]) -> list[Strategy]:
    """Choose the strategies that suit a model and a batch, in the order in which to try them.

    Args:
        model: the model.
        batch: keyword arguments of its forward, or tensors by invented names if there is a `loss_fn`.
        tensors: weights, buffers and tensors of the batch.
    """
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters.keys() - batch.keys()
    has_values = all(map(_has_values, tensors))
    without_cache = [WITHOUT_CACHE] if takes_cache else []
    with_values = [WITH_RECORDED_READS, WITH_VALUES] if has_values else []
    return [THROUGH_DYNAMO, *without_cache, AS_COMPILED, AS_EAGER, *with_values]


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether this process has all values of a tensor."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor))


def _through_dynamo(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    stack.enter_context(_static_and_quiet())
    graph: fx.GraphModule = dynamo_graph_capture_for_export(module)(**batch)
    context: TracingContext = graph.meta[TRACING_CONTEXT]
    stack.enter_context(tracing(context))
    return graph


def _without_cache(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    model = module.get_submodule("model")
    handle = model.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    stack.callback(handle.remove)
    return _through_dynamo(module, batch, stack)


def _refuse_cache(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {"use_cache": False, **kwargs}


def _as_compiled(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    stack.enter_context(as_if_compiling())
    return _as_eager(module, batch, stack)


def _as_eager(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    stack.enter_context(reentrant_checkpoints_as_calls())
    stack.enter_context(eager_lstm_kernels())
    return _every_run_alike(trace_forced_gradients(module))


def _with_recorded_reads(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    stack.enter_context(as_if_compiling())
    twins = {name: buffer.clone() for name, buffer in module.named_buffers()}
    own = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, batch)
    recording, state = RecordingMode(), random_state()
    with attributes_kept(module), torch.enable_grad(), recording:
        torch.func.functional_call(module, twins, (), own)
    mode = ReplayMode(recording.reads)
    stack.enter_context(tracing(TracingContext(mode)))
    module = _as_eager(module, batch, stack)

    def begin(_module: nn.Module, _args: object) -> None:
        restore_random_state(state)  # both runs must draw, and branch on, the numbers of the recorded run
        mode.begin()

    module.register_forward_pre_hook(begin)
    return module


def _with_values(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    mode, state = ValuesMode(), random_state()
    stack.callback(mode.forget)
    stack.enter_context(tracing(TracingContext(mode)))
    module = _as_compiled(module, batch, stack)
    stack.enter_context(NoMemoryAccess())
    # AOTAutograd runs the forward twice: both runs must draw, and branch on, the same random numbers.
    module.register_forward_pre_hook(lambda _module, _args: restore_random_state(state))
    return module


THROUGH_DYNAMO = Strategy(
    name=DYNAMO, sentence="Through Dynamo, as torch.compile captures.", run=_through_dynamo
)
WITHOUT_CACHE = Strategy(
    name=DYNAMO,
    sentence="Through Dynamo, without the cache of keys and values that generation would need.",
    run=_without_cache,
)
AS_COMPILED = Strategy(
    name=EAGER,
    sentence="Operator by operator, with torch.compiler.is_compiling() true.",
    run=_as_compiled,
)
AS_EAGER = Strategy(
    name=EAGER,
    sentence="Operator by operator, with is_compiling() false, as after a graph break.",
    run=_as_eager,
)
WITH_RECORDED_READS = Strategy(
    name=ONE_BATCH,
    sentence="Operator by operator, with the numbers that a run on this batch read from tensors.",
    run=_with_recorded_reads,
)
WITH_VALUES = Strategy(
    name=ONE_BATCH,
    sentence="Operator by operator, with the values of this batch.",
    run=_with_values,
)


def _every_run_alike(module: nn.Module) -> nn.Module:
    """After each run, undo all changes that the forward made to its modules.

    AOTAutograd runs the forward twice. Otherwise the second run could find a tensor that the first run cached
    on a module, and that the second trace does not know.
    """
    forward = module.forward

    def run(**batch: Any) -> Any:
        with attributes_kept(module):
            return forward(**batch)

    module.forward = run
    return module


@contextlib.contextmanager
def _static_and_quiet() -> Iterator[None]:
    """Make Dynamo treat sizes as constants, and skip logging calls instead of breaking the graph at them."""
    # by name, to include methods that libraries add, such as transformers' `warning_once`
    levels = ("debug", "info", "warn", "error")
    calls = {method for name, method in vars(logging.Logger).items() if name.startswith(levels)}
    ignored = calls | set(dynamo_config.ignore_logging_functions)
    settings = dynamo_config.patch(ignore_logging_functions=ignored, automatic_dynamic_shapes=False)
    with settings, settings_not_logged(), captured_as_compiled(), warnings.catch_warnings():
        # Side effects of a forward (such as caching a rotary table) are dropped: a capture changes no model.
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        yield
