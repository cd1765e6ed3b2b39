"""Runs a region whose graph cannot be traced any further in eager PyTorch, with the same gradients."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import fx

from gtcompile.compiler.region_graph import Live, requires_grad
from gtcompile.torch_internals import exceptions_allowed_to_be_fallback

logger = logging.getLogger(__name__)
UNTRACEABLE = exceptions_allowed_to_be_fallback
"""What a tracer raises on a graph that Dynamo could capture: a size that depends on data, an operator without
a fake kernel. With any backend, `torch.compile` runs such a graph in eager PyTorch."""


def run_as_captured(graph: fx.GraphModule, live: Live, reason: Exception) -> Callable[..., Any]:
    """Make a Dynamo graph a function that eager PyTorch runs and differentiates; warn and say why.

    Args:
        graph: left as it is.
        live: positions of the inputs whose gradients are wanted; the others are not differentiated.
        reason: why the graph was not compiled.
    """
    message = str(reason).partition("\n")[0]
    logger.warning(
        "a part of the model runs uncompiled, still with the trained gradients alone: %s: %s",
        type(reason).__name__,
        message,
    )
    return functools.partial(_run, fx.GraphModule(graph, graph.graph), live)


def _run(module: fx.GraphModule, live: Live, *inputs: Any) -> Any:
    return module(*(value if i in live else _without_gradient(value) for i, value in enumerate(inputs)))


def _without_gradient(value: Any) -> Any:
    return value.detach() if requires_grad(value) else value
