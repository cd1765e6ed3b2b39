"""Importances without training: those of an earlier run, the number of elements, or random numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is not needed to refuse a wrong file
    from gtcompile.costs.backward_costs import BackwardCosts


def uniform_importance(costs: BackwardCosts) -> dict[str, float]:
    """The number of elements of every selectable parameter: AdamW moves every element about as far."""
    return {p.fqn: float(p.numel) for p in costs.parameters if p.status == "selectable"}


def draw_importance(costs: BackwardCosts, seed: int) -> dict[str, float]:
    """A random importance for every selectable parameter, log-normal: a few matter far more than the rest."""
    draw = random.Random(seed)
    return {fqn: draw.lognormvariate(0.0, 1.0) for fqn in sorted(costs.fqns)}


def read_importance(path: Path, costs: BackwardCosts) -> dict[str, float]:
    """The importances that the last selection of a run measured; 0 for parameters that it did not measure.

    Raises:
        ValueError: the file is not that of an adaptive run of this model.
    """
    measured = measured_importance(path)
    if unknown := sorted(measured.keys() - costs.fqns):
        raise ValueError(
            f"{path} is of another model: it names {unknown[0]}, which this model does not train"
        )
    return {fqn: measured.get(fqn, 0.0) for fqn in sorted(costs.fqns)}


def measured_importance(path: Path) -> dict[str, float]:
    """The importances of the last selection in a run's `selections.json`, by FQN.

    Raises:
        ValueError: the file is not that of an adaptive run.
    """
    try:
        measured: dict[str, float] = json.loads(path.read_text("utf-8"))[-1]["importance"]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not the selections.json of a run: expected a list of selections"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the selections.json of a run: {error}") from error
    if not measured:
        raise ValueError(f"{path} holds no importances; a run with --policy best measures them")
    return measured
