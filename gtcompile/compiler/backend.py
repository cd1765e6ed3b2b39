"""The `torch.compile` backend."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import fx

from gtcompile.compiler.options import CompileOptions, parse_options
from gtcompile.compiler.region import Region
from gtcompile.compiler.self_test import check_contracts
from gtcompile.torch_internals import ShortenTraceback


class RefusedOptionError(ShortenTraceback, ValueError):
    """A `ValueError` that Dynamo raises unchanged instead of wrapping it in another error."""

    def __init__(self, message: str, frame: FrameType | None) -> None:
        super().__init__(message, first_useful_frame=frame)


def gtcompile(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Compile a graph so that its backward computes the gradients of the trained parameters alone.

    Used as `torch.compile(model, backend="gtcompile")`.

    Args:
        graph: as Dynamo captured it; parameters are among its inputs.
        example_inputs: one per input of the graph.
        options: fields of `CompileOptions`, as given to `torch.compile(options=...)`.
        **others: further arguments of `torch.compile` for its backend, such as `mode`; all are refused.

    Returns:
        A function that takes and returns what the graph does.

    Raises:
        ValueError: for an unknown option or value (lists the known ones), and for anything in `others`.
    """
    try:
        parsed = parse_options(options or {})
        _refuse(others)
    except ValueError as error:
        raise RefusedOptionError(str(error), inspect.currentframe()) from None
    return make_backend(parsed)(graph, example_inputs)


def make_backend(options: CompileOptions) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return a backend that compiles with these options."""

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        check_contracts()
        return Region(graph, example_inputs, options)

    return backend


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that only other backends understand.

    Raises:
        ValueError: naming what was given and what to use instead.
    """
    if not arguments:
        return
    given = ", ".join(f"{name}={value!r}" for name, value in sorted(arguments.items()))
    raise ValueError(
        f'torch.compile(..., {given}) has no meaning for backend="gtcompile"; use options={{...}} with the '
        f"fields of gtcompile.CompileOptions instead. Settings of Inductor, such as max_autotune, are "
        f"made in torch._inductor.config."
    )
