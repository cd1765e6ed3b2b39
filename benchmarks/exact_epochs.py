"""Train five epochs within a budget with each exact saving alone and with all together, and compare.

Run it with `python -m benchmarks.exact_epochs`. The model and the data are those of the demo. Every run
starts from the same weights, sees the same texts in the same order, and trains the same last layers. In every
step, FLOPs are counted, and gradients are compared with those of plain PyTorch at the same weights.
"""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import gtcompile
from benchmarks.measurement import keep_memory
from gtcompile.costs.budgets import budget_flops
from gtcompile.graph.flops import count_flops
from gtcompile.selection.blocks import last_layers
from gtcompile.tools.bench.measurement import describe_machine
from gtcompile.tools.data.batches import Encoded
from gtcompile.tools.runs.preparation import Prepared, prepare
from gtcompile.tools.runs.settings import Settings

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """Which savings a run has."""

    name: str
    """In the table."""
    unpadded: bool = False
    """Whether a batch is as long as its longest text; otherwise as the longest of all."""
    labelled: bool = False
    """Whether logits are computed at labelled positions alone."""
    cached: bool = False
    """Whether the frozen prefix comes from a cache."""


RUNS = (
    Savings(name="none"),
    Savings(name="no padding", unpadded=True),
    Savings(name="labelled logits", labelled=True),
    Savings(name="prefix cache", cached=True),
    Savings(name="all three", unpadded=True, labelled=True, cached=True),
)
FULL = Savings(name="full fine-tuning, no padding", unpadded=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run took."""

    flops: int
    """FLOPs of all steps, counted."""
    seconds: float
    """Processor time of all forwards and backwards."""
    difference: float
    """Greatest difference of a gradient to plain PyTorch's, as a share of its greatest value."""
    loss: float
    """Mean loss of the last epoch."""


def main(
    texts: Annotated[int, typer.Option(min=8, help="texts to train on")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="texts per step")] = 4,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    budget: Annotated[float, typer.Option(help="of the last layers, as a share of a full step")] = 0.5,
) -> None:
    """Print the table."""
    keep_memory()
    comparison = Comparison(texts, rows, epochs, budget)
    full = comparison.run(FULL, None)
    table = Table(title=f"{epochs} epochs within {budget}, as shares of {FULL.name}")
    for column in ("savings", "FLOPs", "processor time", "greatest difference of gradients", "last loss"):
        table.add_column(column)
    for savings in RUNS:
        own = comparison.run(savings, comparison.trained)
        shares = own.flops / full.flops, own.seconds / full.seconds
        table.add_row(
            savings.name, *(f"{share:.3f}" for share in shares), f"{own.difference:.1e}", f"{own.loss:.4f}"
        )
    console = Console()
    console.print(describe_machine(torch.device("cpu")))
    console.print(table)


class Comparison:
    """Runs on the demo's model and data, all from the same start.

    Batches have the same texts in every epoch, texts of similar length together, in another order each time.
    """

    def __init__(self, texts: int, rows: int, epochs: int, budget: float) -> None:
        data = Settings(model="demo", dataset="demo", max_train_samples=texts, max_eval_samples=1)
        self._prepared: Prepared = prepare(data)
        self._epochs = epochs
        ordered = sorted(self._prepared.examples, key=lambda text: len(text.prompt) + len(text.answer))
        self._groups = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
        self._model = self._prepared.language.model.train()
        longest = self._batch(self._groups[-1], Savings(name=""))
        costs = gtcompile.backward_costs(self._model, longest)
        limit = budget_flops(costs.full_flops, budget)
        self.trained = last_layers(costs, frozenset(costs.fqns), limit, frozenset())
        """FQNs of the last layers within the budget."""

    def run(self, savings: Savings, trained: frozenset[str] | None) -> Result:
        """Train twice from the same start: once to take the time, once to count FLOPs and compare gradients.

        Args:
            savings: of the run.
            trained: FQNs to train; None trains everything.
        """
        timed = _Run(self._model, savings, trained)
        for batch, _ in self._batches(savings):
            timed.step(batch)
        checked = _Run(self._model, savings, trained)
        losses = [checked.checked_step(batch, plain) for batch, plain in self._batches(savings)]
        return Result(
            flops=checked.flops,
            seconds=timed.seconds,
            difference=checked.difference,
            loss=sum(losses[-len(self._groups) :]) / len(self._groups),
        )

    def _batches(self, savings: Savings) -> Iterator[tuple[Batch, Batch]]:
        """Batches as these savings make them, each with the same texts padded and with all logits."""
        for epoch in range(self._epochs):
            order = random.Random(epoch).sample(self._groups, len(self._groups))
            for group in order:
                yield self._batch(group, savings), self._batch(group, Savings(name=""))

    def _batch(self, group: Sequence[Encoded], savings: Savings) -> Batch:
        batch = self._prepared.collate(group)
        if savings.unpadded:
            longest = max(len(text.prompt) + len(text.answer) for text in group)
            batch = {name: tensor[:, :longest] for name, tensor in batch.items()}
        return gtcompile.add_labelled_positions(batch, multiple=16) if savings.labelled else batch


class _Run:
    """A model under training, and what its steps took."""

    def __init__(self, start: nn.Module, savings: Savings, trained: frozenset[str] | None) -> None:
        self._model, self._plain = copy.deepcopy(start), copy.deepcopy(start)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        for model in (self._model, self._plain):
            gtcompile.train_only(model, trained)
        if savings.labelled:
            gtcompile.only_labelled_logits(self._model)
        if savings.cached:
            gtcompile.PrefixCache(self._model)
        self.flops, self.seconds, self.difference = 0, 0.0, 0.0

    def step(self, batch: Batch) -> None:
        """One step, of which the forward and backward are timed."""
        began = time.process_time()
        self._model(**batch).loss.backward()
        self.seconds += time.process_time() - began
        self._update()

    def checked_step(self, batch: Batch, plain: Batch) -> float:
        """One step that is counted and whose gradients are compared; its loss."""
        with count_flops() as counter:
            loss = self._model(**batch).loss
            loss.backward()
        self.flops += counter.get_total_flops()
        self._plain.load_state_dict(self._model.state_dict())
        self._plain.zero_grad()
        self._plain(**plain).loss.backward()
        self.difference = max(self.difference, _difference(self._model, self._plain))
        self._update()
        return float(loss.detach())

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def _difference(model: nn.Module, plain: nn.Module) -> float:
    """The greatest difference between two models' gradients, as a share of the greatest of that gradient."""
    pairs: Any = zip(model.parameters(), plain.parameters(), strict=True)
    differences = [0.0]
    for own, other in pairs:
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            differences.append(float((own.grad - other.grad).abs().max() / other.grad.abs().max()))
    return max(differences)


if __name__ == "__main__":
    typer.run(main)
