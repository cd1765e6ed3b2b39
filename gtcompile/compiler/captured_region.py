"""A graph that Dynamo captured, with everything needed to compile it again for another trained set."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gtcompile.compiler.options import CompileOptions
from gtcompile.compiler.partitioning import SavedMemory
from gtcompile.compiler.region_graph import Live, requires_grad
from gtcompile.passes import onednn_products
from gtcompile.passes.loss_only import differentiate_loss_only
from gtcompile.torch_internals import (
    FakeTensor,
    TracingContext,
    exceptions_allowed_to_be_fallback,
    set_grad_mode,
    tracing,
)

logger = logging.getLogger(__name__)
UNTRACEABLE = exceptions_allowed_to_be_fallback
"""Errors of a tracer on a graph that Dynamo could capture, for example because a size depends on data or an
operator has no fake kernel. With any backend, `torch.compile` runs such a graph in eager PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedRegion:
    """The arguments and the state of Dynamo's call of the backend; later variants are compiled from them."""

    graph: fx.GraphModule
    """As Dynamo captured it; a compilation works on a copy."""
    example_inputs: tuple[Any, ...]
    """Fake tensors and numbers, one per input of the graph."""
    parameters: tuple[int, ...]
    """Positions of the inputs that are parameters."""
    activations: tuple[int, ...]
    """Positions of the other inputs that required grad at the capture."""
    grad_enabled: bool
    """Whether gradients were enabled at the capture."""
    differentiable: bool
    """Whether any input required grad at the capture, and gradients were enabled, there or in the graph."""
    context: TracingContext
    """Dynamo's state of the compilation of this graph."""
    options: CompileOptions
    """How to compile it."""

    @property
    def inductor_settings(self) -> dict[str, Any]:
        """Settings of Inductor for every compilation of this graph."""
        settings = {
            "fallback_random": self.options.random == "eager",
            # On a GPU, Inductor would pad products of odd sizes, which costs FLOPs that no budget contains.
            "shape_padding": False,
        }
        return {**settings, **onednn_products.inductor_settings()}

    @property
    def saved_memory(self) -> SavedMemory:
        """What may be saved for the backward, and what is free to save."""
        return SavedMemory(budget=self.options.activation_memory_budget, parameters=self.parameters)

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Enter Dynamo's compilation of this graph again, to compile another variant."""
        with tracing(self.context), torch.set_grad_enabled(self.grad_enabled and self.differentiable):
            yield


def captured_region(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions
) -> CapturedRegion:
    """Make the captured region of a call of the backend.

    Args:
        graph: with parameters among its inputs.
        example_inputs: the real tensors and numbers of the first call, one per input.
        options: how to compile the graph.
    """
    positions = range(len(example_inputs))
    parameters = tuple(i for i in positions if isinstance(example_inputs[i], nn.Parameter))
    differentiated = [i for i in positions if requires_grad(example_inputs[i])]
    if options.differentiate == "loss":
        graph = differentiate_loss_only(graph)
    return CapturedRegion(
        graph=graph,
        example_inputs=tuple(_fake_inputs(graph, example_inputs)),
        parameters=parameters,
        activations=tuple(i for i in differentiated if i not in parameters),
        grad_enabled=torch.is_grad_enabled(),
        differentiable=(torch.is_grad_enabled() or _enables_grad(graph)) and bool(differentiated),
        context=TracingContext.get(),
        options=options,
    )


def _enables_grad(graph: fx.GraphModule) -> bool:
    """Whether a graph has a part under `torch.enable_grad()`, which may be called under `torch.no_grad()`."""
    switches = graph.graph.find_nodes(op="call_function", target=set_grad_mode)
    return any(node.args == (True,) for node in switches)


def _fake_inputs(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The fake tensors that Dynamo traced with: the real inputs may be gone when a variant is compiled."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        _of_backend(node.meta.get("example_value", value))
        for node, value in zip(placeholders, example_inputs, strict=True)
    ]


def _of_backend(value: Any) -> Any:
    """Keep the symbol of a Python number that Dynamo turned into a tensor.

    Backends trace in a fake mode of their own. A fake tensor that is moved there forgets which symbol its
    `.item()` stands for.
    """
    mode = TracingContext.get().fake_mode
    if mode is None or not isinstance(value, FakeTensor) or value.item_memo is None:
        return value
    carried = mode.from_tensor(value)
    carried.item_memo = value.item_memo
    return carried


def run_as_captured(graph: fx.GraphModule, live: Live, reason: Exception) -> Callable[..., Any]:
    """Return a function that runs a Dynamo graph in eager PyTorch; log a warning with the reason.

    Args:
        graph: not changed.
        live: positions of the inputs whose gradients are wanted; the others are not differentiated.
        reason: why the graph was not compiled.
    """
    message = str(reason).partition("\n")[0]
    logger.warning(
        "a part of the model runs uncompiled; only trained gradients are computed all the same: %s: %s",
        type(reason).__name__,
        message,
    )
    return functools.partial(_run, fx.GraphModule(graph, graph.graph), live)


def _run(module: fx.GraphModule, live: Live, *inputs: Any) -> Any:
    return module(*(value if i in live else _without_gradient(value) for i, value in enumerate(inputs)))


def _without_gradient(value: Any) -> Any:
    return value.detach() if requires_grad(value) else value
