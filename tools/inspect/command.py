"""Inspections: the plan for a model and a budget, or a run's selections, without training anything."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.budgets import smallest_budget
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.huggingface.labelled_logits import POSITIONS, TARGETS, only_labelled_logits
from gtcompile.selection.selection import Selection, select_parameters
from gtcompile.tools.common.known_importances import read_importance, uniform_importance
from gtcompile.tools.common.options import BatchShape, is_run
from gtcompile.tools.common.terminal import say
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.options import DEFAULT_BUDGET, PlanOptions
from gtcompile.tools.models.factories import call_factory, is_factory, language_model
from gtcompile.tools.models.loading import model_on_meta, model_with_values
from gtcompile.tools.models.random_batch import random_batch
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.run_record import RunRecord, read_run
from gtcompile.tools.runs.settings import Settings

Batch = Mapping[str, Any]
AS_TRAINED = PlanOptions()
RANDOM_TOKENS = "random tokens and the weights of "


def inspect_model(model: str, options: PlanOptions, progress: Console | None = None) -> Inspection:
    """Plan for a model by any name, or show what a run trained.

    Args:
        model: hub id, directory, `demo`, `module:function`, or the output folder of a run.
        options: what to plan for.
        progress: where to say that weights are needed after all.

    Raises:
        ValueError, GTCompileError: there is no such model, it cannot be captured, or the budget is too small.
    """
    if is_run(Path(model)):
        return inspect_run(Path(model), options, progress)
    if is_factory(model):
        return _inspect_factory(model, options)
    return inspect_shape(model, options, progress)


def _inspect_factory(model: str, options: PlanOptions) -> Inspection:
    made, batch = call_factory(model)
    if batch is not None:
        words, values = described_shapes(batch), "the weights and the batch of " + model
    else:
        made = language_model(model, made)
        batch, words = random_batch(made, options.shape), _words(made, options.shape)
        values = RANDOM_TOKENS + model
    if isinstance(made, PreTrainedModel):
        made.config.use_cache = False
    traced = Traced(capture(made, batch), values)
    return _plan(traced, model, type(made).__name__, words, options)


def inspect_shape(model: str, options: PlanOptions, progress: Console | None = None) -> Inspection:
    """Plan for a language model and batches of the given shape; arguments are those of `inspect_model`.

    No weights are loaded, unless the forward branches on data.

    Raises:
        ValueError, GTCompileError: as for `inspect_model`.
    """
    shape, made = options.shape, model_on_meta(model)
    traced = _trace(model, made, _batch_for(made, shape), lambda: random_batch(made, shape), progress)
    return _plan(traced, model, type(made).__name__, _words(made, shape), options)


def inspect_dataset(
    settings: Settings, importances: Path | None, progress: Console | None = None
) -> Inspection:
    """Plan for the batches that a run with these settings would have.

    No weights are loaded, unless the forward branches on data: then the plan holds for the first examples.

    Raises:
        ValueError, GTCompileError: as for a run.
    """
    options = PlanOptions(budget=settings.budget, importances=importances)
    prepared = prepare(settings, weights=False)
    made, batch = prepared.language.model, prepared.collate(prepared.examples[: settings.batch_size])
    traced = _trace(settings.model, made, batch, None, progress)
    return _plan(traced, settings.model, type(made).__name__, prepared.collate.shape, options)


def inspect_run(path: Path, options: PlanOptions = AS_TRAINED, progress: Console | None = None) -> Inspection:
    """Show what a run trained and what it cost; with a budget or importances, make a new plan for its model.

    Raises:
        ValueError: the folder is of another version, or its model is not the one that is captured now.
    """
    run = read_run(path)
    made, shape = model_on_meta(run.model), run.batch_shape
    batch = run.batch()
    positions: dict[str, torch.Tensor] = {name: batch[name] for name in (POSITIONS, TARGETS) if name in batch}
    traced = _trace(
        run.model,
        made,
        batch,
        lambda: {**random_batch(made, shape), **positions},
        progress,
        complete=run.adapted,
    )
    inspection = inspection_of_run(run, traced, type(made).__name__)
    if options.budget is None and options.importances is None:
        return inspection
    if options.budget is None:
        most = min(run.selections[-1]["budget_flops"], inspection.costs.full_flops)
        options = replace(options, budget=smallest_budget(inspection.costs.full_flops, most))
    if options.importances is None:
        options = replace(options, importances=path / "selections.json")
    return _plan(traced, str(path), inspection.architecture, run.shape, options, run)


@dataclass(frozen=True, slots=True)
class Traced:
    """A joint graph, and the values it was captured with."""

    joint: JointGraph
    """The joint graph as captured, every gradient live."""
    origin: str
    """The origin of these values in words."""

    @property
    def values(self) -> str | None:
        """The values that decided which branch the forward took; None if it does not branch on data."""
        return self.origin if self.joint.follows_values else None


def _trace(
    name: str,
    made: PreTrainedModel,
    batch: Batch,
    tokens: Callable[[], Batch] | None,
    progress: Console | None,
    *,
    complete: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Traced:
    """Capture a model without weights, or with weights if its forward branches on data.

    Args:
        name: of the model, to load its weights.
        made: the model on the meta device.
        batch: of the wanted shape.
        tokens: makes a batch of that shape with random tokens; None if `batch` holds real ones.
        progress: where to say that weights are needed.
        complete: adds what the model of a run has beside its base.
    """

    def ready(base: PreTrainedModel) -> nn.Module:
        base.config.use_cache = False
        model = complete(base)
        if POSITIONS in batch:
            only_labelled_logits(model)
        return model

    try:
        return Traced(capture(ready(made), batch), "no values")
    except CaptureError as error:
        if not error.without_values:
            raise
        reason = str(error).partition("\n")[0]
    model, weights = model_with_values(name, made.config)
    if progress is not None:
        say(progress, f"{reason} without values: run once with {weights}")
    values = f"{weights} and " + ("the first examples" if tokens is None else "random tokens")
    return Traced(capture(ready(model), batch if tokens is None else tokens()), values)


def inspection_of_run(run: RunRecord, traced: Traced, architecture: str) -> Inspection:
    """Show what a run trained last, on the graph of its model.

    If the forward branches on data, the graph may follow another branch than the run's own batches.

    Raises:
        ValueError: the graph's FLOPs are not those that the run recorded.
    """
    joint, last = traced.joint, run.selections[-1]
    costs = costs_of(joint)
    trained = frozenset(last["trained"])
    if joint.follows_values:
        trained &= costs.fqns
    elif trained - costs.fqns or costs.step_flops(trained) != last["step_flops"]:
        raise ValueError(
            f"the model captured now needs other FLOPs than the run in {run.path} recorded: another version "
            f"of gtcompile, torch or transformers wrote it. Inspect {run.path / 'model'} instead"
        )
    importance = dict(last["importance"])
    budget_of = run.settings.get("budget_of", "step")
    whole = (
        {} if budget_of == "step" else {"budget_of": budget_of, "full_finetuning_flops": last["whole_flops"]}
    )
    total = math.fsum(importance.get(fqn, 0.0) for fqn in sorted(trained))
    selection = Selection(
        trained=trained,
        selectable=last["selectable"],
        step_flops=last["step_flops"],
        budget_flops=last["budget_flops"],
        full_flops=last["full_flops"],
        importance=total,
        importance_bound=last["importance_bound"],
        **whole,
    )
    measured = f"measured in epoch {last['epoch'] + 1}, where plans within the budget reach"
    origin = measured if importance else "not measured by this run"
    return Inspection(
        model=str(run.path),
        architecture=architecture,
        batch=run.shape,
        joint=joint,
        costs=costs,
        importance=importance,
        importance_origin=origin,
        selection=selection,
        run=run,
        values=traced.values,
    )


def described_shapes(batch: Batch) -> str:
    """The names and shapes of a batch's tensors in words."""
    shapes = {name: value.shape for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())


def _batch_for(model: PreTrainedModel, shape: BatchShape) -> Batch:
    columns = shape.label_columns(model.config.is_encoder_decoder)
    ids, labels = (torch.zeros(shape.batch_size, n, dtype=torch.long) for n in (shape.length, columns))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _words(model: PreTrainedModel, shape: BatchShape) -> str:
    return shape.describe(model.config.is_encoder_decoder)


def _plan(
    traced: Traced,
    name: str,
    architecture: str,
    shape: str,
    options: PlanOptions,
    run: RunRecord | None = None,
) -> Inspection:
    costs, path = costs_of(traced.joint), options.importances
    importance = uniform_importance(costs) if path is None else read_importance(path, costs)
    origin = (
        "not known without a run; every element of every parameter counts the same"
        if path is None
        else f"the last selection in {path}; parameters that it did not measure count 0"
    )
    budget = DEFAULT_BUDGET if options.budget is None else options.budget
    return Inspection(
        model=name,
        architecture=architecture,
        batch=shape,
        joint=traced.joint,
        costs=costs,
        importance=importance,
        importance_origin=origin,
        selection=select_parameters(costs, importance, budget),
        run=run,
        values=traced.values,
    )
