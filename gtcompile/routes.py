"""The ways to trace a model and a batch, from the one that sees most to the one that needs most."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from gtcompile.torch_internals import (
    TracingContext,
    captured_as_compiled,
    dynamo_config,
    dynamo_graph_capture_for_export,
    tracing,
)

Narrowed = Callable[..., nn.Module]
"""Makes the module that returns the model's loss, given more arguments for the model's forward."""
Route = Callable[[Narrowed, dict[str, Any], contextlib.ExitStack], tuple[nn.Module, str]]
"""Makes of a model and a batch what AOTAutograd can trace, and says how."""


def routes(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[Route]:
    """The ways to capture, in the order they are tried."""
    yield _through_dynamo
    if "use_cache" in inspect.signature(model.forward).parameters.keys() - batch.keys():
        yield _without_cache
    yield _through_eager


def _through_dynamo(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Through Dynamo, as torch.compile captures."""
    return _dynamo_graph(narrowed(), batch, stack), "dynamo"


def _without_cache(
    narrowed: Narrowed, batch: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[nn.Module, str]:
    """Through Dynamo, without the cache of keys and values that generation would need."""
    return _dynamo_graph(narrowed(use_cache=False), batch, stack), "dynamo"


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
    return narrowed(), "eager trace"


@contextlib.contextmanager
def _static_and_quiet() -> Iterator[None]:
    """Shapes as they come, and log calls in the forward passed over rather than refused."""
    loggers = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning, logging.Logger.error}
    ignored = loggers | set(dynamo_config.ignore_logging_functions) | _loggers_own_methods()
    settings = dynamo_config.patch(ignore_logging_functions=ignored, automatic_dynamic_shapes=False)
    with settings, captured_as_compiled(), warnings.catch_warnings():
        # Side effects (a cached rotary table, say) stay in the forward: there is none to replay them in.
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        yield


def _loggers_own_methods() -> set[Any]:
    """Methods other libraries add to `logging.Logger`, such as transformers' `warning_once`."""
    return {
        method for name, method in vars(logging.Logger).items() if name.startswith(("warn", "info", "debug"))
    }
