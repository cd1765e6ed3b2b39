"""The plan for a model and a budget, or of a run, worked out without training anything."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.selection.selection import Selection, select_parameters
from gtcompile.tools.common.factories import call_factory, is_factory, language_model
from gtcompile.tools.common.known_importances import measured_importance, read_importance, uniform_importance
from gtcompile.tools.common.subject import random_batch
from gtcompile.tools.common.terminal import say
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.models.loading import model_on_meta, model_with_values
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.run_record import RunRecord, is_run, read_run
from gtcompile.tools.runs.settings import Settings, check_budget_option

Batch = Mapping[str, Any]
RANDOM_TOKENS = "random tokens and the weights of "
DEFAULT_BUDGET = 0.5
"""Where none is asked for; a run has its own."""


def inspect_model(
    model: str,
    budget: float | None,
    *,
    batch_size: int,
    length: int,
    target_length: int,
    importances: Path | None,
    progress: Console | None = None,
) -> Inspection:
    """Plan for a model however it is named, or tell what a run trained.

    Args:
        model: hub id, directory, `demo`, `module:function`, or the output folder of a run.
        budget: share of a full step's FLOPs, in (0, 1]; None takes 0.5, or what a run trained last.
        batch_size: rows.
        length: input tokens per row.
        target_length: answer tokens per row, for an encoder-decoder.
        importances: `selections.json` of a run of this model; None takes the run's own, or a stand-in.
        progress: told where weights are needed after all.

    Raises:
        ValueError, GTCompileError: the model is not there or cannot be captured, or the budget is too small.
    """
    shape = {"batch_size": batch_size, "length": length, "target_length": target_length}
    for name, value in shape.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    check_budget_option(budget)
    if importances is not None:
        measured_importance(importances)
    if is_run(Path(model)):
        return inspect_run(Path(model), budget, importances, progress=progress)
    wanted = DEFAULT_BUDGET if budget is None else budget
    if is_factory(model):
        made, batch = call_factory(model)
        if batch is not None:
            told, values = described_shapes(batch), "the weights and the batch of " + model
        else:
            made = language_model(model, made)
            batch, told, values = random_batch(made, **shape), _told(made, **shape), RANDOM_TOKENS + model
        if isinstance(made, PreTrainedModel):
            made.config.use_cache = False
        traced = Traced(capture(made, batch), values)
        return _plan(traced, model, type(made).__name__, told, wanted, importances)
    return inspect_shape(model, wanted, **shape, importances=importances, progress=progress)


def inspect_shape(
    model: str,
    budget: float,
    *,
    batch_size: int,
    length: int,
    target_length: int,
    importances: Path | None,
    progress: Console | None = None,
) -> Inspection:
    """Plan for batches of a given shape. Arguments are those of `inspect_model`.

    No weights are loaded, unless the forward branches on data.

    Raises:
        ValueError, GTCompileError: as for `inspect_model`.
    """
    shape = {"batch_size": batch_size, "length": length, "target_length": target_length}
    made = model_on_meta(model)
    traced = _trace(model, made, _batch_for(made, **shape), lambda: random_batch(made, **shape), progress)
    return _plan(traced, model, type(made).__name__, _told(made, **shape), budget, importances)


def inspect_dataset(
    settings: Settings, importances: Path | None, progress: Console | None = None
) -> Inspection:
    """Plan for the batches that a run with these settings would have.

    No weights are loaded, unless the forward branches on data: then what holds for the first example is told.

    Raises:
        ValueError, GTCompileError: as for a run.
    """
    if importances is not None:
        measured_importance(importances)
    prepared = prepare(settings, weights=False)
    made, batch = prepared.language.model, prepared.collate(prepared.examples[: settings.batch_size])
    traced = _trace(settings.model, made, batch, None, progress)
    return _plan(
        traced, settings.model, type(made).__name__, prepared.collate.shape, settings.budget, importances
    )


def inspect_run(
    path: Path,
    budget: float | None = None,
    importances: Path | None = None,
    progress: Console | None = None,
) -> Inspection:
    """What a run trained and what it cost, from its folder; with a budget, a plan for its importances.

    Raises:
        ValueError: the folder is of another version, or its model is another than the one captured now.
    """
    run = read_run(path)
    made, batch = model_on_meta(run.model), run.batch()
    (rows, length), (_, columns) = batch["input_ids"].shape, batch["labels"].shape
    shape = {"batch_size": rows, "length": length, "target_length": columns}
    traced = _trace(run.model, made, batch, lambda: random_batch(made, **shape), progress)
    inspection = inspection_of_run(run, traced, type(made).__name__)
    if budget is None and importances is None:
        return inspection
    source = path / "selections.json" if importances is None else importances
    wanted = float(run.settings["budget"]) if budget is None else budget
    return _plan(traced, str(path), inspection.architecture, run.shape, wanted, source, run)


@dataclass(frozen=True, slots=True)
class Traced:
    """A joint graph, and whose values it follows, if any."""

    joint: JointGraph
    """As captured, every gradient live."""
    origin: str
    """Whose values it was captured with, in words."""

    @property
    def values(self) -> str | None:
        """Whose values decided which way the forward took; None where it takes the same for all."""
        return self.origin if self.joint.follows_values else None


def _trace(
    name: str,
    made: PreTrainedModel,
    batch: Batch,
    tokens: Callable[[], Batch] | None,
    progress: Console | None,
) -> Traced:
    """The joint graph of a model without weights; where its forward branches on data, with weights.

    Args:
        name: of the model, to find its weights by.
        made: on the meta device.
        batch: of the shape wanted.
        tokens: makes a batch of that shape with random tokens; None where `batch` has real ones.
        progress: told where weights are needed.
    """
    made.config.use_cache = False
    try:
        return Traced(capture(made, batch), "no values")
    except CaptureError as error:
        if not error.without_values:
            raise
        reason = str(error).partition("\n")[0]
    model, weights = model_with_values(name, made.config)
    model.config.use_cache = False
    if progress is not None:
        say(progress, f"{reason} without values: run once with {weights}")
    values = f"{weights} and " + ("the first examples" if tokens is None else "random tokens")
    return Traced(capture(model, batch if tokens is None else tokens()), values)


def inspection_of_run(run: RunRecord, traced: Traced, architecture: str) -> Inspection:
    """What a run trained last, on the graph of its model.

    Where the forward branches on data the graph need not go the way of the batch that the run selected with.

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
            f"the model captured now takes other FLOPs than the run in {run.path} recorded: it was written "
            f"with another version of gtcompile, torch or transformers. Inspect {run.path / 'model'} instead"
        )
    importance = dict(last["importance"])
    total = math.fsum(importance.get(fqn, 0.0) for fqn in sorted(trained))
    bound = last["importance_bound"]
    selection = Selection(
        trained=trained,
        selectable=last["selectable"],
        step_flops=last["step_flops"],
        budget_flops=last["budget_flops"],
        full_flops=last["full_flops"],
        importance=total,
        importance_bound=total if bound is None else bound,
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
    """The tensors of a batch by name, in words."""
    shapes = {name: value.shape for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())


def _batch_for(model: PreTrainedModel, *, batch_size: int, length: int, target_length: int) -> Batch:
    columns = target_length if model.config.is_encoder_decoder else length
    ids, labels = (torch.zeros(batch_size, n, dtype=torch.long) for n in (length, columns))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _told(model: PreTrainedModel, *, batch_size: int, length: int, target_length: int) -> str:
    answer = f", {target_length} answer tokens" if model.config.is_encoder_decoder else ""
    return f"{batch_size} x {length} tokens{answer}"


def _plan(
    traced: Traced,
    name: str,
    architecture: str,
    shape: str,
    budget: float,
    importances: Path | None,
    run: RunRecord | None = None,
) -> Inspection:
    costs = costs_of(traced.joint)
    importance = uniform_importance(costs) if importances is None else read_importance(importances, costs)
    origin = (
        "not known without a run; every element of every parameter counts the same"
        if importances is None
        else f"the last selection in {importances}; parameters it did not measure count 0"
    )
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
