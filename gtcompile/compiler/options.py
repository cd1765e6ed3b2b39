"""The options of a compilation, checked before anything is compiled."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """How `torch.compile(model, backend="gtcompile")` and `compile_blocks` compile a model."""

    compiler: Literal["inductor", "eager"] = "inductor"
    """`inductor` generates code; `eager` calls the operators of the rewritten graphs one by one, with results
    bit-equal to eager PyTorch."""
    variants: Literal["specialized", "hoisted"] = "specialized"
    """`specialized` compiles anew for each trained set; `hoisted` compiles once for all of them."""
    variants_kept: int = 16
    """How many specialized variants of a graph are kept; the least recently used is dropped."""
    cut_chains: Literal["run", "compile"] = "compile"
    """How the graph in which a hoisted backward ends runs its part: `compile` compiles the part, `run` calls
    its operators one by one."""
    differentiate: Literal["everything", "loss"] = "everything"
    """`loss` promises that only scalar outputs are differentiated: the backward then needs no memory for
    zero gradients of the logits."""
    random: Literal["eager", "compiler"] = "eager"
    """Which random numbers dropout draws. `eager`: those of eager PyTorch, in every variant; `compiler`:
    Inductor's own, generated where they are used, which is faster."""
    activation_memory_budget: float = 1.0
    """Fraction, in [0, 1], of the bytes saved for the backward that may be saved. The backward recomputes the
    rest, which costs FLOPs that `backward_costs` does not count."""


def parse_options(options: Mapping[str, Any]) -> CompileOptions:
    """Check the names and values of options.

    Args:
        options: fields of `CompileOptions` by name; a field that is left out keeps its default.

    Raises:
        ValueError: for an unknown name or value; lists the known ones.
    """
    known = {field.name for field in dataclasses.fields(CompileOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
    hints = get_type_hints(CompileOptions)
    for name, value in options.items():
        choices = get_args(hints[name])
        if choices and value not in choices:
            raise ValueError(f"option {name}={value!r}: expected one of {', '.join(map(repr, choices))}")
    kept = options.get("variants_kept", 1)
    if not isinstance(kept, int) or kept < 1:
        raise ValueError(f"option variants_kept={kept!r}: expected a whole number of at least 1")
    memory = options.get("activation_memory_budget", 1.0)
    if not isinstance(memory, (int, float)) or not 0 <= memory <= 1:
        raise ValueError(f"option activation_memory_budget={memory!r}: expected a fraction from 0 to 1")
    return CompileOptions(**options)
