"""`gtcompile export --onnx`: a model by name and a trained set, exported as an ONNX file."""

from pathlib import Path

from torch import nn

from gtcompile.costs.backward_costs import backward_costs
from gtcompile.selection.selection import select_parameters
from gtcompile.tools.common.known_importances import uniform_importance
from gtcompile.tools.common.options import BatchShape, is_run
from gtcompile.tools.models.factories import call_factory, is_factory, language_model
from gtcompile.tools.models.loading import load_model
from gtcompile.tools.models.random_batch import check_length, random_batch
from gtcompile.tools.onnx.export import Batch, Export, export_onnx
from gtcompile.tools.onnx.optimizer_step import Update
from gtcompile.tools.onnx.options import ExportOptions
from gtcompile.tools.runs.run_record import RunRecord, read_run


def export(name: str, options: ExportOptions) -> Export:
    """Export the training step of a model, without dropout.

    Args:
        name: hub id, local directory with weights, `demo`, `module:function`, or the output folder of a run.
        options: what to export, and to which file.

    Raises:
        ValueError: there is no such model, or a pattern matches nothing.
        GTCompileError: the budget is too small, or the step cannot be exported.
    """
    run = read_run(Path(name)) if is_run(Path(name)) else None
    model, batch = _model_and_batch(name, run, options.shape)
    trained = options.train
    if trained is None and run is not None:
        trained = tuple(run.selections[-1]["trained"])
    if options.budget is not None:
        costs = backward_costs(model, batch)
        trained = tuple(select_parameters(costs, uniform_importance(costs), options.budget).trained)
    update = None if options.optimizer is None else Update(name=options.optimizer)
    return export_onnx(model, batch, options.path, trained=trained, update=update, dynamic=options.dynamic)


def _model_and_batch(name: str, run: RunRecord | None, shape: BatchShape) -> tuple[nn.Module, Batch]:
    if run is not None:
        name, shape = run.model, run.batch_shape
    made, batch = call_factory(name) if is_factory(name) else (load_model(name), None)
    if batch is not None:
        return made.eval(), batch
    model = language_model(name, made)
    batch = random_batch(model, shape)
    check_length(model, batch)
    return (model if run is None else run.adapted(model)).eval(), batch
