"""The `torch.compile` backend."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from torch import fx

from gtcompile.compiler.region import Region, RegionOptions
from gtcompile.compiler.self_test import check_contracts


def gtcompile(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a graph so that its backward can be narrowed to a trained set.

    Used as `torch.compile(model, backend="gtcompile")`.

    Args:
        graph: as Dynamo captured it, parameters lifted to inputs.
        example_inputs: one per placeholder.
        options: fields of `RegionOptions`, as given to `torch.compile(options=...)`.

    Raises:
        ValueError: for an unknown option or value, listing the known ones.
    """
    return make_backend(parse_options(options or {}))(graph, example_inputs)


def make_backend(options: RegionOptions) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend with its options decided; blocks compiled with the same one share their captures."""

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        check_contracts()
        return Region(graph, example_inputs, options)

    return backend


def parse_options(options: Mapping[str, Any]) -> RegionOptions:
    """Check the options of a backend.

    Raises:
        ValueError: for an unknown option or value, listing the known ones.
    """
    known = {field.name for field in dataclasses.fields(RegionOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
    hints = get_type_hints(RegionOptions)
    for name, value in options.items():
        choices = get_args(hints[name])
        if choices and value not in choices:
            raise ValueError(f"option {name}={value!r}: expected one of {', '.join(map(repr, choices))}")
    kept = options.get("variants_kept", 1)
    if not isinstance(kept, int) or kept < 1:
        raise ValueError(f"option variants_kept={kept!r}: expected a whole number of at least 1")
    memory = options.get("activation_memory_budget", 1.0)
    if not isinstance(memory, (int, float)) or not 0 <= memory <= 1:
        raise ValueError(f"option activation_memory_budget={memory!r}: expected a share from 0 to 1")
    return RegionOptions(**options)
