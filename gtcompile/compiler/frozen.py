"""The forward of a region in which nothing is trained: no autograd, nothing saved for backward."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from gtcompile.compiler.eager_fallback import UNTRACEABLE, run_as_captured
from gtcompile.torch_internals import compile_fx


def compile_frozen(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    compiler: Literal["inductor", "eager"],
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a Dynamo graph for inputs of which none is differentiated.

    Args:
        graph: left as it is.
        example_inputs: fake tensors and numbers, one per placeholder.
        compiler: who turns the graph into code; "eager" runs the graph as Dynamo captured it.
        patches: of Inductor's settings.

    Returns:
        A function of the graph's inputs whose outputs need no gradient.
    """
    run: Any = fx.GraphModule(graph, graph.graph)  # whose Python code is made now, not at the first call
    if compiler == "inductor":
        try:
            with torch.no_grad():
                run = compile_fx(run, example_inputs, config_patches=patches)
        except UNTRACEABLE as error:
            run = run_as_captured(graph, frozenset(), error)

    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            outputs = run(*inputs)
        return [_writable(output) for output in outputs]

    return forward


def _writable(output: Any) -> Any:
    """An output as eager PyTorch makes it: autograd forbids to write into views made without it."""
    return output.data if isinstance(output, torch.Tensor) and output._is_view() else output
