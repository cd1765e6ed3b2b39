"""Time a step with logits at labelled positions alone and with a cached prefix, beside full steps.

Run it with `python -m benchmarks.exact_savings`. The model has the shape of SmolLM2-135M and random weights.
Predicted FLOPs and measured times are printed as shares of a full step of plain eager PyTorch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile
from benchmarks.measurement import in_turns, keep_memory, median_interval
from gtcompile.costs.budgets import budget_flops
from gtcompile.huggingface.labelled_logits import all_logits_meant
from gtcompile.selection.blocks import last_layers
from gtcompile.tools.bench.measurement import describe_machine

Batch = dict[str, torch.Tensor]
Step = Callable[[], None]
VOCABULARY = 49152
LABELLED = 26
"""Tokens of a text that have a label: a summary in SciTLDR and the end-of-text token."""
WARM_UP = 4
"""Steps before a measurement; by then the cache holds the batch and has compared its first hit."""


def main(
    layers: Annotated[int, typer.Option(min=2)] = 30,
    rows: Annotated[int, typer.Option(min=1, help="texts per step")] = 8,
    length: Annotated[int, typer.Option(min=LABELLED, help="tokens per text")] = 160,
    budget: Annotated[float, typer.Option(help="of the last layers, as a share of a full step")] = 0.5,
    pairs: Annotated[int, typer.Option(min=1, help="steps of both in turns")] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Print the table."""
    keep_memory()
    console = Console()
    steps = Steps(layers, rows, length, budget, torch.device(device))
    table = Table(title=f"Shares of a full step; last layers within a budget of {budget}")
    for column in ("trained", "step", "FLOPs", "time (95 % of the median)"):
        table.add_column(column)
    for trained, name, flops, step in steps.trials():
        time = median_interval(in_turns(step, steps.eager, pairs, steps.device))
        table.add_row(trained, name, f"{flops:.3f}", str(time))
    console.print(describe_machine(steps.device))
    console.print(table)


class Steps:
    """A compiled model with both savings, an eager one without, and steps of each."""

    def __init__(
        self,
        layers: int,
        rows: int,
        length: int,
        budget: float,
        device: torch.device,
        compiler: str = "inductor",
    ) -> None:
        self.device = device
        self._model, plain = make_model(layers, device), make_model(layers, device)
        ids = torch.randint(3, VOCABULARY, (rows, length), device=device)
        labels = ids.clone()
        labels[:, : length - LABELLED] = -100
        batch = {"input_ids": ids, "labels": labels}
        self._batches = {False: batch, True: gtcompile.add_labelled_positions(batch)}
        costs = gtcompile.backward_costs(plain, batch)
        self._full_flops, limit = costs.full_flops, budget_flops(costs.full_flops, budget)
        self._last = last_layers(costs, frozenset(costs.fqns), limit, frozenset())
        gtcompile.compile_blocks(self._model, compiler=compiler)
        gtcompile.only_labelled_logits(self._model)
        self._cache = gtcompile.PrefixCache(self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)
        self.eager: Step = lambda: _step(plain, plain_optimizer, batch)

    def trials(self) -> Iterator[tuple[str, str, float, Step]]:
        """What is trained, the kind of step, its predicted share of a full step's FLOPs, and the step."""
        for trained, patterns in (("everything", None), ("last layers", self._last)):
            gtcompile.train_only(self._model, patterns)
            for labelled in (False, True):
                for cached in (False, True) if patterns else (False,):
                    self._cache.enabled = cached
                    batch = self._batches[labelled]
                    for _ in range(WARM_UP):
                        _step(self._model, self._optimizer, batch)
                    name = ", ".join(["labelled logits"] * labelled + ["cached prefix"] * cached)
                    yield trained, name or "as ever", self._share(batch, cached=cached), self._own(batch)

    def _own(self, batch: Batch) -> Step:
        return lambda: _step(self._model, self._optimizer, batch)

    def _share(self, batch: Batch, *, cached: bool) -> float:
        with self._cache.pretend_hit() if cached else contextlib.nullcontext():
            costs = gtcompile.backward_costs(self._model, batch)
        return costs.step_flops(gtcompile.trained_parameters(self._model)) / self._full_flops


def make_model(layers: int, device: torch.device) -> nn.Module:
    """A model of SmolLM2-135M's shape with so many blocks and random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]
    return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16), all_logits_meant():
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    typer.run(main)
