"""The plan for a model and a budget, printed without training anything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from gtcompile.dependencies import BackwardCosts, backward_costs
from gtcompile.selection import Selection, select_parameters
from gtcompile.tools.models import model_on_meta
from gtcompile.tools.preparation import prepare
from gtcompile.tools.settings import Settings

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a step costs and what a budget would train."""

    model: str
    """As asked for."""
    batch: str
    """The shape that FLOPs are quoted for."""
    costs: BackwardCosts
    """Of every trained set."""
    importance: Mapping[str, float]
    """By FQN."""
    importance_origin: str
    """Where the importances come from."""
    selection: Selection
    """The best for these importances."""

    def rows(self) -> list[dict[str, Any]]:
        """One per parameter, in registration order.

        `dw_flops` is what only this parameter's gradient needs. `marginal_flops` is what a step loses without
        it where it is trained, and would gain with it where it is frozen.
        """
        own = {next(iter(w.parameters)): w.flops for w in self.costs.shared_work if len(w.parameters) == 1}
        return [
            {
                "parameter": p.fqn,
                "aliases": list(p.aliases),
                "shape": list(p.shape),
                "dw_flops": own.get(p.fqn, 0),
                "marginal_flops": self._marginal(p.fqn),
                "importance": self.importance.get(p.fqn),
                "status": self._status(p.fqn, p.status),
            }
            for p in self.costs.parameters
        ]

    def _marginal(self, fqn: str) -> int:
        if fqn not in self.costs.fqns:
            return 0
        return self.costs.marginal_flops(fqn, self.selection.trained - {fqn})

    def _status(self, fqn: str, status: str) -> str:
        if status != "selectable":
            return status
        return "trained" if fqn in self.selection.trained else "frozen"

    def totals(self) -> dict[str, Any]:
        """FLOPs of one step against the budget."""
        return {
            "forward_flops": self.costs.forward_flops,
            "full_flops": self.costs.full_flops,
            "budget_flops": self.selection.budget_flops,
            "step_flops": self.selection.step_flops,
            "minimum_budget_fraction": self.costs.minimum_budget_fraction,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "model": self.model,
            "batch": self.batch,
            "importance_origin": self.importance_origin,
            **self.totals(),
            "parameters": self.rows(),
        }

    def table(self) -> Table:
        """One line per parameter."""
        table = Table(title=f"{self.model}: {self.selection}")
        table.add_column("parameter", overflow="fold")
        for column in ("shape", "dW FLOPs", "marginal FLOPs", "importance", ""):
            table.add_column(column, justify="right")
        for row in self.rows():
            table.add_row(
                row["parameter"],
                " x ".join(map(str, row["shape"])),
                f"{row['dw_flops']:.3g}",
                f"{row['marginal_flops']:.3g}",
                "-" if row["importance"] is None else f"{row['importance']:.3g}",
                row["status"],
            )
        return table

    def lines(self) -> list[str]:
        """The totals in words."""
        full, totals = self.costs.full_flops, self.totals()
        shares = {
            "forward": "forward_flops",
            "full step": "full_flops",
            "budget": "budget_flops",
            "this plan": "step_flops",
        }
        return [
            f"batches of {self.batch}; FLOPs per training step at this shape, 2 per multiply-add",
            *(
                f"{name}: {totals[key]:.6g} FLOPs, {totals[key] / full:.1%} of full"
                for name, key in shares.items()
            ),
            f"smallest budget that trains anything: {totals['minimum_budget_fraction']:.4f}",
            f"importance: {self.importance_origin}",
        ]


def inspect_shape(
    model: str, budget: float, *, batch_size: int, length: int, target_length: int, importances: Path | None
) -> Inspection:
    """Plan for batches of a given shape; no weights are loaded.

    Args:
        model: hub id, directory or `demo`; only its configuration is read.
        budget: share of a full step's FLOPs, in (0, 1].
        batch_size: rows.
        length: input tokens per row.
        target_length: answer tokens per row, for an encoder-decoder.
        importances: `selections.json` of a run of this model; None takes a stand-in.

    Raises:
        ValueError, GTCompileError: the model is not there or cannot be captured, or the budget is too small.
    """
    for name, value in (("batch-size", batch_size), ("length", length), ("target-length", target_length)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    architecture = model_on_meta(model)
    columns = target_length if architecture.config.is_encoder_decoder else length
    ids, labels = (torch.zeros(batch_size, n, dtype=torch.long) for n in (length, columns))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    answer = f", {target_length} answer tokens" if architecture.config.is_encoder_decoder else ""
    return _inspect(
        model, architecture, batch, f"{batch_size} x {length} tokens{answer}", budget, importances
    )


def inspect_dataset(settings: Settings, importances: Path | None) -> Inspection:
    """Plan for the batches that a run with these settings would have; no weights are loaded.

    Raises:
        ValueError, GTCompileError: as for a run.
    """
    prepared = prepare(settings, weights=False)
    batch = prepared.collate(prepared.examples[:1])
    shape = prepared.collate.shape
    return _inspect(settings.model, prepared.language.model, batch, shape, settings.budget, importances)


def _inspect(
    name: str, model: PreTrainedModel, batch: Batch, shape: str, budget: float, importances: Path | None
) -> Inspection:
    model.config.use_cache = False
    costs = backward_costs(model, batch)
    importance = uniform_importance(costs) if importances is None else read_importance(importances, costs)
    origin = (
        "not known without a run; every element of every parameter counts the same"
        if importances is None
        else f"the last selection in {importances}; parameters it did not measure count 0"
    )
    return Inspection(
        model=name,
        batch=shape,
        costs=costs,
        importance=importance,
        importance_origin=origin,
        selection=select_parameters(costs, importance, budget),
    )


def uniform_importance(costs: BackwardCosts) -> dict[str, float]:
    """A stand-in before any run: the number of elements, since AdamW moves each about as far."""
    return {p.fqn: float(p.numel) for p in costs.parameters if p.status == "selectable"}


def read_importance(path: Path, costs: BackwardCosts) -> dict[str, float]:
    """The importances that the last selection of a run measured; 0 for what it did not measure.

    Raises:
        ValueError: the file is not that of an adaptive run of this model.
    """
    try:
        measured = json.loads(path.read_text("utf-8"))[-1]["importance"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the selections.json of a run: {error}") from error
    if not measured:
        raise ValueError(f"{path} holds no importances; only a run with --method adaptive measures them")
    if unknown := sorted(measured.keys() - costs.fqns):
        raise ValueError(f"{path} is of another model: it names {unknown[0]}, which this one does not train")
    return {fqn: measured.get(fqn, 0.0) for fqn in sorted(costs.fqns)}
