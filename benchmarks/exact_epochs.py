"""Train five epochs within a budget with each exact saving alone and with all together, and compare.

Run it with `python -m benchmarks.exact_epochs`. The model and the data are those of the demo, or any that
`gtcompile finetune` takes. Every run starts from the same weights, sees the same texts in the same order, and
trains the same last layers. FLOPs are counted in every step, and gradients are compared with those of plain
PyTorch at the same weights. A step after the last epoch, with the same savings, shows the memory it takes.
"""

import copy
import math
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
from gtcompile.tools.common.step_memory import peak_bytes
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
    peak_bytes: int
    """Most bytes allocated at once in a forward and backward, beside weights and cached values."""
    cached_bytes: int
    """Size of the cached values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """How a run is measured."""

    at_once: bool = False
    """Whether one training is timed, counted and compared, which takes half as long; the time then includes
    the counter's. Otherwise there are two, and the first is only timed."""
    compare_every: int = 1
    """Steps from one comparison of gradients to the next."""


def main(
    texts: Annotated[int, typer.Option(min=8, help="texts to train on")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="texts per step")] = 4,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    budget: Annotated[float, typer.Option(help="of the last layers, as a share of a full step")] = 0.5,
    model: Annotated[str, typer.Option(help="as for `gtcompile finetune`")] = "demo",
    dataset: Annotated[str, typer.Option(help="as for `gtcompile finetune`")] = "demo",
    data_dir: Annotated[str | None, typer.Option(help="folder with the dataset's files")] = None,
    max_length: Annotated[int, typer.Option(help="longest text, in tokens")] = 512,
    lr: Annotated[float, typer.Option(help="learning rate of AdamW")] = 1e-3,
    at_once: Annotated[bool, typer.Option(help="time, count and compare in one training")] = False,
    compare_every: Annotated[int, typer.Option(min=1, help="steps between two comparisons")] = 1,
) -> None:
    """Print the table."""
    keep_memory()
    console = Console()
    console.print(describe_machine(torch.device("cpu")))
    settings = Settings(
        model=model,
        dataset=dataset,
        data_dir=data_dir,
        max_length=max_length,
        max_train_samples=texts,
        max_eval_samples=1,
        lr=lr,
    )
    checks = Checks(at_once=at_once, compare_every=compare_every)
    comparison = Comparison(settings, rows, epochs, budget, checks)
    full = comparison.run(FULL, None)
    _say(console, FULL, full)
    table = Table(title=f"{epochs} epochs within {budget}, as shares of {FULL.name}")
    for column in ("savings", "FLOPs", "processor time", "memory of a step", "cached values"):
        table.add_column(column)
    for column in ("greatest difference of gradients", "last loss"):
        table.add_column(column)
    for savings in RUNS:
        own = comparison.run(savings, comparison.trained)
        _say(console, savings, own)
        shares = own.flops / full.flops, own.seconds / full.seconds, own.peak_bytes / full.peak_bytes
        table.add_row(
            savings.name,
            *(f"{share:.3f}" for share in shares),
            f"{own.cached_bytes / 1e6:.1f} MB",
            f"{own.difference:.1e}",
            f"{own.loss:.4f}",
        )
    console.print(table)


def _say(console: Console, savings: Savings, result: Result) -> None:
    """Print what a run took as soon as it is known."""
    megabytes = result.peak_bytes / 1e6
    console.print(
        f"{savings.name}: {result.flops:.4e} FLOPs, {result.seconds:.1f} s, {megabytes:.1f} MB, "
        f"differences up to {result.difference:.1e}, last loss {result.loss:.4f}"
    )


class Comparison:
    """Runs on one model and its data, all from the same start.

    Batches have the same texts in every epoch, texts of similar length together, in another order each time.
    """

    def __init__(self, data: Settings, rows: int, epochs: int, budget: float, checks: Checks) -> None:
        self._prepared: Prepared = prepare(data)
        self._epochs, self._checks, self._lr = epochs, checks, data.lr
        ordered = sorted(self._prepared.examples, key=lambda text: len(text.prompt) + len(text.answer))
        self._groups = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
        self._model = self._prepared.language.model.train()
        longest = self._batch(self._groups[-1], Savings(name=""))
        costs = gtcompile.backward_costs(self._model, longest)
        limit = budget_flops(costs.full_flops, budget)
        self.trained = last_layers(costs, frozenset(costs.fqns), limit, frozenset())
        """FQNs of the last layers within the budget."""

    def run(self, savings: Savings, trained: frozenset[str] | None) -> Result:
        """Train from the same start as every run, and measure.

        Args:
            savings: of the run.
            trained: FQNs to train; None trains everything.
        """
        seconds = None
        if not self._checks.at_once:
            timed = _Run(self._model, savings, trained, self._lr)
            for batch, _ in self._batches(savings):
                timed.step(batch)
            seconds = timed.seconds
        checked = _Run(self._model, savings, trained, self._lr)
        losses = []
        for index, (batch, plain) in enumerate(self._batches(savings)):
            compared = index % self._checks.compare_every == 0
            losses.append(checked.checked_step(batch, plain if compared else None))
        return Result(
            flops=checked.flops,
            seconds=checked.seconds if seconds is None else seconds,
            difference=checked.difference,
            loss=sum(losses[-len(self._groups) :]) / len(self._groups),
            peak_bytes=checked.peak_bytes(self._batch(self._groups[-1], savings)),
            cached_bytes=checked.cached_bytes,
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

    def __init__(self, start: nn.Module, savings: Savings, trained: frozenset[str] | None, lr: float) -> None:
        self._model, self._plain = copy.deepcopy(start), copy.deepcopy(start)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=lr)
        for model in (self._model, self._plain):
            gtcompile.train_only(model, trained)
        if savings.labelled:
            gtcompile.only_labelled_logits(self._model)
        self._cache = gtcompile.PrefixCache(self._model) if savings.cached else None
        self.flops, self.seconds, self.difference = 0, 0.0, 0.0

    def step(self, batch: Batch) -> None:
        """One step, of which the forward and backward are timed."""
        began = time.process_time()
        self._model(**batch).loss.backward()
        self.seconds += time.process_time() - began
        self._update()

    def checked_step(self, batch: Batch, plain: Batch | None) -> float:
        """One step that is timed and counted; its loss.

        Args:
            batch: to train on.
            plain: the same padded and with all logits, to compare gradients; None compares none.
        """
        began = time.process_time()
        with count_flops() as counter:
            loss = self._model(**batch).loss
            loss.backward()
        self.seconds += time.process_time() - began
        self.flops += counter.get_total_flops()
        if plain is not None:
            self._plain.load_state_dict(self._model.state_dict())
            self._plain.zero_grad()
            self._plain(**plain).loss.backward()
            self.difference = max(self.difference, _difference(self._model, self._plain))
        self._update()
        return float(loss.detach())

    def peak_bytes(self, batch: Batch) -> int:
        """Most bytes allocated at once in a forward and backward."""
        return peak_bytes(lambda: self._model(**batch).loss.backward(), torch.device("cpu"))

    @property
    def cached_bytes(self) -> int:
        """Size of the cached values."""
        return self._cache.stats.bytes if self._cache else 0

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def _difference(model: nn.Module, plain: nn.Module) -> float:
    """The greatest difference between two models' gradients, as a share of the greatest of that gradient."""
    pairs: Any = zip(model.parameters(), plain.parameters(), strict=True)
    differences = [torch.tensor(0.0)]
    for own, other in pairs:
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            differences.append((own.grad - other.grad).abs().max() / other.grad.abs().max())
    greatest = float(torch.stack(differences).max())  # unlike max(), keeps a NaN
    assert math.isfinite(greatest), "a gradient is not finite, or zero throughout"
    return greatest


if __name__ == "__main__":
    typer.run(main)
