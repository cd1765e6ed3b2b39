"""The ways to trace a model and a batch, from the one that sees most to the one that needs most."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from gtcompile.capture.forced_gradients import trace_what_asks
from gtcompile.capture.rng import random_state, restore_random_state
from gtcompile.capture.value_tracing import NumbersByOperators, ValuesMode
from gtcompile.graph.joint_graph import ONE_BATCH
from gtcompile.torch_internals import (
    FakeTensor,
    TracingContext,
    captured_as_compiled,
    dynamo_config,
    dynamo_graph_capture_for_export,
    is_traceable_wrapper_subclass,
    lstm_kernels_of_eager,
    reentrant_checkpoints_passed_over,
    settings_not_logged,
    told_to_be_compiled,
    tracing,
)

Narrowed = Callable[..., nn.Module]
"""Makes the module that returns the model's loss, given more arguments for the model's forward."""
Route = Callable[[Narrowed, dict[str, Any], contextlib.ExitStack], tuple[nn.Module, str]]
"""Makes of a model and a batch what AOTAutograd can trace, and says how."""

BY_DYNAMO = "dynamo"
"""The source of a graph that `torch.compile` would capture as one."""


def routes(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[Route]:
    """The ways to capture, in the order they are tried."""
    yield _through_dynamo
    if "use_cache" in inspect.signature(model.forward).parameters.keys() - batch.keys():
        yield _without_cache
    yield _through_eager
    yield _told_nothing
    if all(map(_has_values, (*model.parameters(), *model.buffers(), *batch.values()))):
        yield with_values


def _has_values(value: object) -> bool:
    """Whether this is no tensor, or one that holds all its values here."""
    if not isinstance(value, torch.Tensor):
        return True
    return not (value.is_meta or isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value))


def _through_dynamo(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Through Dynamo, as torch.compile captures."""
    return _dynamo_graph(narrowed(), batch, stack), BY_DYNAMO


def _without_cache(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Through Dynamo, without the cache of keys and values that generation would need."""
    return _dynamo_graph(narrowed(use_cache=False), batch, stack), BY_DYNAMO


def _dynamo_graph(module: nn.Module, batch: dict[str, Any], stack: contextlib.ExitStack) -> nn.Module:
    stack.enter_context(_static_and_quiet())
    graph: fx.GraphModule = dynamo_graph_capture_for_export(module)(**batch)
    context: TracingContext = graph.meta["tracing_context"]
    stack.enter_context(tracing(context))
    return graph


def _through_eager(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Operator by operator, as eager PyTorch runs."""
    stack.enter_context(_as_compiled())
    return trace_what_asks(narrowed()), "eager trace"


def _told_nothing(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Operator by operator, the model not told that it is compiled: a graph break where it could not be."""
    stack.enter_context(reentrant_checkpoints_passed_over())
    stack.enter_context(lstm_kernels_of_eager())
    return trace_what_asks(narrowed()), "eager trace"


def with_values(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Operator by operator, with the values of this batch."""
    module, mode, state = trace_what_asks(narrowed()), ValuesMode(), random_state()
    stack.callback(mode.forget)
    stack.enter_context(tracing(TracingContext(mode)))
    stack.enter_context(_as_compiled())
    stack.enter_context(NumbersByOperators())
    # AOTAutograd runs the forward twice: both times it must draw, and branch on, the same random numbers.
    module.register_forward_pre_hook(lambda _module, _args: restore_random_state(state))
    return module, ONE_BATCH


@contextlib.contextmanager
def _as_compiled() -> Iterator[None]:
    """What Dynamo would see to, where it is not asked."""
    with told_to_be_compiled(), reentrant_checkpoints_passed_over(), lstm_kernels_of_eager():
        yield


@contextlib.contextmanager
def _static_and_quiet() -> Iterator[None]:
    """Shapes as they come, and log calls in the forward passed over rather than refused."""
    loggers = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning, logging.Logger.error}
    ignored = loggers | set(dynamo_config.ignore_logging_functions) | _loggers_own_methods()
    settings = dynamo_config.patch(ignore_logging_functions=ignored, automatic_dynamic_shapes=False)
    with settings, settings_not_logged(), captured_as_compiled(), warnings.catch_warnings():
        # Side effects (a cached rotary table, say) stay in the forward: there is none to replay them in.
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        yield


def _loggers_own_methods() -> set[Any]:
    """Methods other libraries add to `logging.Logger`, such as transformers' `warning_once`."""
    return {
        method for name, method in vars(logging.Logger).items() if name.startswith(("warn", "info", "debug"))
    }
