"""Time products of float32 matrices in oneDNN and in torch: the reason for the pass `onednn_products`.

Run it with `python -m benchmarks.onednn_products`. It prints ratios only.
"""

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import in_turns, keep_memory, median_interval
from gtcompile.passes.onednn_products import PRODUCT, onednn_is_faster
from gtcompile.tools.bench.measurement import describe_machine

Product = Callable[[], torch.Tensor]
CPU = torch.device("cpu")


def main(
    rows: Annotated[int, typer.Option(min=1, help="tokens per batch")] = 512,
    hidden: Annotated[
        int, typer.Option(min=1, help="width of a block; inside it is four times as wide")
    ] = 512,
    vocabulary: Annotated[int, typer.Option(min=1)] = 8192,
    pairs: Annotated[int, typer.Option(min=1, help="calls of both in turns")] = 50,
) -> None:
    """Time the products of a linear layer's forward and of its two gradients."""
    console = Console()
    keep_memory()
    table = Table(title="oneDNN's time over torch's: median (95 % of the median)")
    table.add_column("rows x inputs x outputs")
    kinds = ("forward", "gradient of the inputs", "gradient of the weight")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for inputs, outputs in (
        (hidden, hidden),
        (hidden, 4 * hidden),
        (4 * hidden, hidden),
        (hidden, vocabulary),
    ):
        times = [
            median_interval(in_turns(ours, torchs, pairs, CPU))
            for ours, torchs in products(rows, inputs, outputs)
        ]
        table.add_row(f"{rows} x {inputs} x {outputs}", *map(str, times))
    console.print(describe_machine(CPU))
    console.print(table)
    console.print(f"Compiled regions use {'oneDNN' if onednn_is_faster() else 'torch'}'s here.")


def products(rows: int, inputs: int, outputs: int) -> Iterator[tuple[Product, Product]]:
    """Of a linear layer: oneDNN's and torch's forward, gradient of the inputs, gradient of the weight."""
    x, weight, tangent = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    for left, right in ((x, weight.t()), (tangent, weight), (tangent.t(), x)):
        pair = (lambda a=left, b=right: PRODUCT(a, b)), (lambda a=left, b=right: torch.mm(a, b))
        for product in pair:
            product()
        yield pair


if __name__ == "__main__":
    typer.run(main)
