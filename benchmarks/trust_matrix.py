"""Known failures of freezing, measured for three ways to freeze: `python -m benchmarks.trust_matrix`."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from gtcompile import compile_blocks, train_only
from gtcompile.graph.flops import count_flops

LAYERS, VOCABULARY, LENGTH = 8, 32, 16
TOP = ("layers.6.", "layers.7.")
"""Parts of the names of the last two blocks' parameters."""
SETS = 12
"""More sets than the eight that Dynamo compiles for one function by default."""
ALLOWED_WITH_CHECKPOINTING = 1.35
"""Most backward FLOPs with checkpointing, relative to those without, if only trained blocks recompute."""


class Probe(nn.Module):
    """Passes its input on, and counts how often it ran outside of compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.eager_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        if not torch.compiler.is_compiling():
            self.eager_calls += 1
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to train a part of a model."""

    name: str
    compile: Callable[[nn.Module], Any]
    """Compiles a model; returns the module that a step calls."""
    choose: Callable[[nn.Module, Collection[str]], object]
    """Trains exactly the named parameters from now on."""
    compiled: bool
    """Whether a step is meant to run compiled code."""


def toggle(model: nn.Module, trained: Collection[str]) -> None:
    """Freeze by `requires_grad_`, as scripts and LISA's callback do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


WAYS = (
    Way(
        name="torch.compile, requires_grad_",
        compile=lambda model: torch.compile(model, backend="aot_eager"),
        choose=toggle,
        compiled=True,
    ),
    Way(name="LISA-style callback, eager", compile=lambda model: model, choose=toggle, compiled=False),
    Way(
        name="gtcompile",
        compile=lambda model: compile_blocks(model, compiler="eager"),
        choose=train_only,
        compiled=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one way in one scenario."""

    right: bool
    seen: str
    """The result in a few words."""


def build() -> OPTForCausalLM:
    """A small OPT without dropout, its blocks probed."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=128,  # four times the width, as in every OPT
        num_attention_heads=4,
        max_position_embeddings=32,
        dropout=0.0,
        use_cache=False,
    )
    config._attn_implementation = "eager"  # fused attention is recomputed by operators that nothing counts
    model = OPTForCausalLM(config)
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.Sequential(Probe(), layer.activation_fn)
    model.train()
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two rows of random tokens."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def one_block(number: int) -> Callable[[nn.Module], list[str]]:
    """The parameters of one block."""
    return lambda model: [name for name, _ in model.named_parameters() if f"layers.{number}." in name]


def last_blocks(model: nn.Module) -> list[str]:
    """The parameters of the last two blocks."""
    return [name for name, _ in model.named_parameters() if any(part in name for part in TOP)]


def with_gradient(model: nn.Module) -> set[str]:
    """Names of the parameters that have a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def stale_graph(way: Way) -> Finding:
    """After a change of the set, gradients are those of the new set."""
    model = build()
    run = way.compile(model)
    for number in (6, 3):
        trained = one_block(number)(model)
        way.choose(model, trained)
        model.zero_grad()
        run(**batch()).loss.backward()
    wrong = with_gradient(model) ^ set(trained)
    return Finding(right=not wrong, seen=f"{len(wrong)} parameters wrong")


def silent_eager(way: Way) -> Finding:
    """With the twelfth set, a step still runs compiled code."""
    model = build()
    run = way.compile(model)
    probes = [module for module in model.modules() if isinstance(module, Probe)]
    names = [name for name, _ in model.named_parameters() if "layers." in name]
    for number in range(SETS):
        way.choose(model, names[number::SETS])
        model.zero_grad()
        for probe in probes:
            probe.eager_calls = 0
        run(**batch()).loss.backward()
    if not way.compiled:
        return Finding(right=True, seen="never compiled")
    eager = sum(probe.eager_calls > 0 for probe in probes)
    return Finding(right=not eager, seen=f"{eager} of {LAYERS} blocks eager")


def _after_a_change(way: Way) -> tuple[nn.Module, torch.optim.AdamW, dict[str, torch.Tensor], list[str]]:
    """A model trained everywhere, then in one block, with gradients set to zero rather than to None.

    Returns:
        The model, its optimizer, copies of weights and moments of the first block at the change, its names.
    """
    model = build()
    run, optimizer = way.compile(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = {name: parameter for name, parameter in model.named_parameters() if "layers.0." in name}
    kept: dict[str, torch.Tensor] = {}
    for trained in ([name for name, _ in model.named_parameters()], one_block(7)(model)):
        way.choose(model, trained)
        kept = {name: parameter.detach().clone() for name, parameter in names.items()}
        kept |= {
            f"{name} moment": optimizer.state[p]["exp_avg"].clone()
            for name, p in names.items()
            if p in optimizer.state
        }
        for _ in range(2):
            run(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return model, optimizer, kept, list(names)


def drift(way: Way) -> Finding:
    """Frozen weights stay bit for bit, in a loop that sets gradients to zero."""
    model, _, kept, names = _after_a_change(way)
    moved = [name for name in names if not torch.equal(model.get_parameter(name), kept[name])]
    return Finding(right=not moved, seen=f"{len(moved)} of {len(names)} weights moved")


def state_changed(way: Way) -> Finding:
    """The optimizer's state of frozen parameters stays bit for bit, in the same loop."""
    model, optimizer, kept, names = _after_a_change(way)
    changed = [
        name
        for name in names
        if not torch.equal(optimizer.state[model.get_parameter(name)]["exp_avg"], kept[f"{name} moment"])
    ]
    return Finding(right=not changed, seen=f"{len(changed)} of {len(names)} states changed")


def gradient_set(way: Way) -> Finding:
    """After a change between two accumulated batches, only newly trained parameters have gradients."""
    model = build()
    run = way.compile(model)
    for number in (2, 5):
        trained = one_block(number)(model)
        way.choose(model, trained)
        run(**batch()).loss.backward()
    wrong = with_gradient(model) ^ set(trained)
    return Finding(right=not wrong, seen=f"{len(wrong)} parameters too many")


def checkpointing(way: Way) -> Finding:
    """Transformers' activation checkpointing leaves the frozen prefix out of the backward."""
    ratio = _backward_flops(way, checkpointed=True) / _backward_flops(way, checkpointed=False)
    return Finding(right=ratio <= ALLOWED_WITH_CHECKPOINTING, seen=f"{ratio:.2f} times the backward")


def _backward_flops(way: Way, *, checkpointed: bool) -> int:
    torch.compiler.reset()
    model = build()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()  # as peft and older transformers do for checkpointing
    run = way.compile(model)
    way.choose(model, last_blocks(model))
    run(**batch()).loss.backward()
    model.zero_grad()
    loss = run(**batch()).loss
    with count_flops() as counter:
        loss.backward()
    return int(counter.get_total_flops())


SCENARIOS: dict[str, Callable[[Way], Finding]] = {
    "gradients of an earlier set after a change": stale_graph,
    "silently eager after eight sets": silent_eager,
    "frozen weights drift": drift,
    "optimizer state of frozen parameters changes": state_changed,
    "gradients left of an earlier set": gradient_set,
    "activation checkpointing undoes the freeze": checkpointing,
}


def findings() -> Iterator[tuple[str, str, Finding]]:
    """Yield scenario, way and result; Dynamo is reset before every measurement."""
    for scenario, measure in SCENARIOS.items():
        for way in WAYS:
            torch.compiler.reset()
            yield scenario, way.name, measure(way)


def main() -> None:
    """Measure and print the matrix."""
    table = Table("", *(way.name for way in WAYS), title="Known failures of freezing")
    cells: dict[str, list[str]] = {}
    for scenario, _, finding in findings():
        mark = "right" if finding.right else "FAILS"
        cells.setdefault(scenario, []).append(f"{mark}: {finding.seen}")
    for scenario, row in cells.items():
        table.add_row(scenario, *row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
