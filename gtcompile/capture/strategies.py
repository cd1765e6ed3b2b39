"""Strategies for tracing a model and a batch, from the one that captures most to the one that needs most."""

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
)

DYNAMO = "dynamo"
"""The source of a graph that `torch.compile` would capture as one."""
EAGER = "eager trace"
"""The source of a graph that was traced operator by operator, across graph breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to trace a model and a batch."""

    name: str
    """The `source` of graphs that are captured in this way."""
    sentence: str
    """What it does, for the error that lists every strategy that failed."""
    needs_values: bool = False
    """Whether it runs the model on the values of weights and batch."""
    without_cache: bool = False
    """Whether it is for models whose forward takes `use_cache`, where the batch does not set it."""
    run: Callable[[nn.Module, dict[str, Any], contextlib.ExitStack], nn.Module]
    """From a module around the model, which returns the loss, and a batch, to what AOTAutograd traces; enters
    on the stack the contexts in which it must do so."""


def strategies(model: nn.Module, batch: Mapping[str, Any], tensors: Iterable[torch.Tensor]) -> list[Strategy]:
    """Choose the strategies that suit a model and a batch, in the order in which to try them.

    Args:
        model: the model.
        batch: keyword arguments of its forward, as far as they are known.
        tensors: weights, buffers and tensors of the batch.
    """
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters.keys() - batch.keys()
    has_values = all(map(_has_values, tensors))
    return [
        strategy
        for strategy in (THROUGH_DYNAMO, WITHOUT_CACHE, AS_COMPILED, AS_EAGER, WITH_VALUES)
        if (takes_cache or not strategy.without_cache) and (has_values or not strategy.needs_values)
    ]


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds all its values in this process."""
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
    without_cache=True,
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
WITH_VALUES = Strategy(
    name=ONE_BATCH,
    sentence="Operator by operator, with the values of this batch.",
    needs_values=True,
    run=_with_values,
)


def _every_run_alike(module: nn.Module) -> nn.Module:
    """Undo after each run what the forward wrote to its modules.

    AOTAutograd runs the forward twice. Without this, the second run would find a table that the first run has
    cached on a module, a tensor that is unknown to the second trace.
    """
    forward = module.forward

    def run(**batch: Any) -> Any:
        with attributes_kept(module):
            return forward(**batch)

    module.forward = run
    return module


@contextlib.contextmanager
def _static_and_quiet() -> Iterator[None]:
    """Have Dynamo treat sizes as constants, and skip log calls in the forward instead of refusing them."""
    loggers = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning, logging.Logger.error}
    ignored = loggers | set(dynamo_config.ignore_logging_functions) | _loggers_own_methods()
    settings = dynamo_config.patch(ignore_logging_functions=ignored, automatic_dynamic_shapes=False)
    with settings, settings_not_logged(), captured_as_compiled(), warnings.catch_warnings():
        # A forward's side effects (caching a rotary table, say) are dropped: the capture changes no model.
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        yield


def _loggers_own_methods() -> set[Any]:
    """Methods that other libraries add to `logging.Logger`, such as transformers' `warning_once`."""
    return {
        method for name, method in vars(logging.Logger).items() if name.startswith(("warn", "info", "debug"))
    }
