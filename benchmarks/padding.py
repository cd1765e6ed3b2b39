"""Count what padding costs in an epoch on SciTLDR: padded to the longest text, grouped by length, and packed.

Run it with `python -m benchmarks.padding FOLDER`, where the folder holds SciTLDR's files. The model has the
shape of SmolLM2-135M and no weights. FLOPs of a step are counted at three lengths on the meta device, and
those at other lengths follow exactly; the first of these is counted as well, and must agree.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.exact_savings import make_model
from gtcompile.costs.batch_shapes import BatchShapes, batch_shapes, combination
from gtcompile.graph.flops import count_flops
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.settings import Settings


class EpochFlops:
    """FLOPs of epochs of a model whose blocks from one on, and its head, are trained.

    Args:
        layers: of the model.
        first: number of the lowest block that is trained; None trains everything.
    """

    def __init__(self, layers: int, first: int | None) -> None:
        self._model = make_model(layers, torch.device("meta"))
        for name, parameter in self._model.named_parameters():
            block = name.split(".")[2] if name.startswith("model.layers.") else ""
            parameter.requires_grad_(first is None or (bool(block) and int(block) >= first))
        self._counted: dict[BatchShapes, int] = {}
        self._checked = 0

    def of(self, batches: Iterator[tuple[int, int]]) -> int:
        """FLOPs of the steps on batches of so many rows and tokens."""
        return sum(map(self._step, *zip(*batches, strict=True)))

    def _step(self, rows: int, length: int) -> int:
        shapes = batch_shapes(torch.empty(rows, length))
        if shapes in self._counted:
            return self._counted[shapes]
        factors = combination(list(self._counted), shapes) if self._counted else None
        if factors is None:
            self._counted[shapes] = self._count(rows, length)
            return self._counted[shapes]
        flops = int(sum(factor * self._counted[known] for known, factor in factors.items()))
        if self._checked < len(self._counted):
            self._checked = len(self._counted)
            assert flops == self._count(rows, length)
        return flops

    def _count(self, rows: int, length: int) -> int:
        ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        with (
            count_flops() as counter
        ):  # with a cache, transformers does not look at positions, which have no values
            self._model(input_ids=ids, labels=ids, use_cache=True).loss.backward()
        return int(counter.get_total_flops())


def main(
    folder: Annotated[Path, typer.Argument(help="with SciTLDR's train.jsonl, dev.jsonl and test.jsonl")],
    rows: Annotated[int, typer.Option(min=1, help="texts per step")] = 8,
    layers: Annotated[int, typer.Option(min=1)] = 30,
    first: Annotated[int, typer.Option(min=0, help="lowest block that is trained")] = 24,
    texts: Annotated[int | None, typer.Option(min=8, help="take only so many")] = None,
) -> None:
    """Print the table."""
    data = Settings(
        model="smollm2", dataset="scitldr", data_dir=str(folder), batch_size=rows, max_train_samples=texts
    )
    lengths = [len(text.prompt) + len(text.answer) for text in prepare(data, weights=False).examples]
    shares = {first: EpochFlops(layers, first), None: EpochFlops(layers, None)}
    whole = {trained: flops.of(iter(padded(lengths, rows))) for trained, flops in shares.items()}
    table = Table(
        title=f"FLOPs of an epoch of {len(lengths)} texts, {rows} per step, over padded to the longest"
    )
    for column in ("batches", "tokens that are padding", f"blocks from {first} on", "everything"):
        table.add_column(column)
    for name, make in (("padded", padded), ("grouped by length", grouped), ("packed", packed)):
        batches = make(lengths, rows)
        empty = 1 - sum(lengths) / sum(each * length for each, length in batches)
        own = (f"{flops.of(iter(batches)) / whole[trained]:.3f}" for trained, flops in shares.items())
        table.add_row(name, f"{empty:.1%}", *own)
    Console().print(table)


def padded(lengths: list[int], rows: int) -> list[tuple[int, int]]:
    """Rows and tokens of batches that are all as long as the longest text, rounded up to a multiple of 8."""
    longest = _rounded(max(lengths))
    return [(rows, longest)] * -(-len(lengths) // rows)


def grouped(lengths: list[int], rows: int) -> list[tuple[int, int]]:
    """Those of batches of similar length, each as long as its longest text, rounded up likewise."""
    order = get_length_grouped_indices(lengths, rows, generator=torch.Generator().manual_seed(0))
    return [(rows, _rounded(max(group))) for group in _in_groups([lengths[i] for i in order], rows)]


def packed(lengths: list[int], rows: int) -> list[tuple[int, int]]:
    """Those of batches of as many texts in a random order, one after the other in one row."""
    order = random.Random(0).sample(lengths, len(lengths))
    return [(1, sum(group)) for group in _in_groups(order, rows)]


def _in_groups(lengths: list[int], rows: int) -> list[list[int]]:
    return [lengths[start : start + rows] for start in range(0, len(lengths), rows)]


def _rounded(length: int) -> int:
    return -(-length // 8) * 8


if __name__ == "__main__":
    typer.run(main)
