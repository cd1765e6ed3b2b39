"""A worked example: twenty AdamW steps in ONNX Runtime, and the same steps in PyTorch.

`python -m benchmarks.onnx_training MODEL` exports the step of what half the FLOPs train, drives it with
numpy and ONNX Runtime alone, and prints both losses. `train_in_onnx_runtime` is the loop to write in another
language.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.models.loading import load_model
from gtcompile.tools.models.random_batch import random_batch
from gtcompile.tools.onnx.command import export
from gtcompile.tools.onnx.options import ExportOptions

Arrays = dict[str, np.ndarray[Any, Any]]
STEPS, LR = 20, 1e-3
SHAPE = BatchShape(batch_size=2, length=32, target_length=16)
BATCHES = 4
"""Drawn at random and taken in turn, so that there is something to learn."""


def train_in_onnx_runtime(
    step: Path, weights: Arrays, batches: Sequence[Arrays], lr: float
) -> tuple[list[float], Arrays]:
    """Train with an exported AdamW step; nothing of PyTorch is used.

    Args:
        step: the file that `gtcompile export --optimizer adamw` wrote.
        weights: by FQN, float32.
        batches: by name, one per step.
        lr: learning rate.

    Returns:
        The loss of every step, and the weights afterwards.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(step), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    state = {f"parameter.{fqn}": weight for fqn, weight in weights.items()}
    for value in session.get_inputs():
        if value.name.startswith("moment"):
            state[value.name] = np.zeros(value.shape, np.float32)
    losses = []
    for number, batch in enumerate(batches, start=1):
        scalars = {"optimizer.lr": np.array(lr, np.float32), "optimizer.step": np.array(number, np.float32)}
        values = state | scalars | {f"batch.{name}": value for name, value in batch.items()}
        inputs = {value.name: values[value.name] for value in session.get_inputs()}
        results = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        losses.append(float(results.pop("loss")))
        state |= {name.removeprefix("new_"): value for name, value in results.items()}
    return losses, {fqn: state[f"parameter.{fqn}"] for fqn in weights}


def train_in_torch(
    model: nn.Module, trained: Sequence[str], batches: Sequence[Mapping[str, torch.Tensor]], lr: float
) -> list[float]:
    """The same steps with `torch.optim.AdamW`; returns their losses."""
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(fqn in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(
    model: Annotated[str, typer.Argument(help="Hub id, directory with weights, or demo.")] = "demo",
    budget: Annotated[float, typer.Option(help="Share of a full step's FLOPs that may be spent.")] = 0.5,
) -> None:
    """Export a step, train with it, and print both losses."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    subject = load_model(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        exported = export(model, ExportOptions(path=path, budget=budget, optimizer="adamw", shape=SHAPE))
        typer.echo(exported)
        drawn = [random_batch(subject, SHAPE) for _ in range(BATCHES)]
        batches = [drawn[step % BATCHES] for step in range(STEPS)]
        weights = {fqn: p.detach().clone().numpy() for fqn, p in subject.named_parameters()}
        arrays = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
        ours, after = train_in_onnx_runtime(path, weights, arrays, LR)
    theirs = train_in_torch(subject, exported.trained, batches, LR)
    typer.echo("step  loss in ONNX Runtime  in PyTorch")
    for number, (loss, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        typer.echo(f"{number:4}  {loss:20.6f}  {other:10.6f}")
    off = max(float(np.abs(after[fqn] - p.detach().numpy()).max()) for fqn, p in subject.named_parameters())
    typer.echo(f"weights at most {off:.1e} apart; AdamW moves one by up to {STEPS * LR:.0e} in {STEPS} steps")


if __name__ == "__main__":
    typer.run(main)
