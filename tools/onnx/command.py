"""What `gtcompile export --onnx` does: a model by name, a choice of what to train, an ONNX file."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from torch import nn

from gtcompile.costs.backward_costs import backward_costs
from gtcompile.selection.selection import select_parameters
from gtcompile.tools.common.factories import call_factory, is_factory, language_model
from gtcompile.tools.common.known_importances import uniform_importance
from gtcompile.tools.common.subject import check_length, random_batch
from gtcompile.tools.inspect.outputs import check_writable
from gtcompile.tools.models.loading import load_model
from gtcompile.tools.onnx.export import Batch, Export, export_onnx
from gtcompile.tools.onnx.training_step import OptimizerName, Update
from gtcompile.tools.runs.run_record import is_run, read_run
from gtcompile.tools.runs.settings import check_budget_option


def export(
    name: str,
    path: Path,
    *,
    train: Sequence[str] | None = None,
    budget: float | None = None,
    optimizer: str | None = None,
    dynamic: bool = False,
    batch_size: int = 4,
    length: int = 64,
    target_length: int = 16,
) -> Export:
    """Export the training step of a model, without dropout.

    Args:
        name: hub id, local directory with weights, `demo`, `module:function`, or the output folder of a run.
        path: of the file.
        train: patterns of parameters to train; None and no budget trains everything, or what a run trained
            last.
        budget: share of a full step's FLOPs; every parameter counts as much as it has elements.
        optimizer: `sgd` or `adamw` to include the update.
        dynamic: whether other batch sizes and lengths than these work.
        batch_size: rows; a run has a shape of its own.
        length: input tokens per row.
        target_length: answer tokens per row of an encoder-decoder.

    Raises:
        ValueError: an argument or the model's name is wrong.
        GTCompileError: the budget is too small, or the step cannot be exported.
    """
    if train is not None and budget is not None:
        raise ValueError("expected --train or --budget, got both; leave one out")
    if optimizer is not None and optimizer not in get_args(OptimizerName):
        raise ValueError(f"expected --optimizer sgd or adamw, got {optimizer!r}")
    for option, count in (("batch-size", batch_size), ("length", length), ("target-length", target_length)):
        if count < 1:
            raise ValueError(f"--{option}: expected at least 1, got {count}")
    check_budget_option(budget)
    check_writable("--onnx", path)
    model, batch = _model_and_batch(name, batch_size, length, target_length)
    trained: Sequence[str] | frozenset[str] | None = train
    if is_run(Path(name)) and train is None:
        trained = read_run(Path(name)).selections[-1]["trained"]
    if budget is not None:
        costs = backward_costs(model, batch)
        trained = select_parameters(costs, uniform_importance(costs), budget).trained
    update = None if optimizer is None else Update(name="sgd" if optimizer == "sgd" else "adamw")
    return export_onnx(model, batch, path, trained=trained, update=update, dynamic=dynamic)


def _model_and_batch(name: str, rows: int, length: int, target_length: int) -> tuple[nn.Module, Batch]:
    if is_run(Path(name)):
        run = read_run(Path(name))
        name, shapes = run.model, run.batch()
        (rows, length), target_length = shapes["input_ids"].shape, shapes["labels"].shape[1]
    made, batch = call_factory(name) if is_factory(name) else (load_model(name), None)
    if batch is not None:
        return made.eval(), batch
    model = language_model(name, made)
    batch = random_batch(model, batch_size=rows, length=length, target_length=target_length)
    check_length(model, batch)
    return model.eval(), batch
