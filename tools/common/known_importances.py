"""Importances for a plan without training: those of an earlier run, or a stand-in."""

import json
from pathlib import Path

from gtcompile.costs.backward_costs import BackwardCosts


def uniform_importance(costs: BackwardCosts) -> dict[str, float]:
    """A stand-in before any run: the number of elements, since AdamW moves each about as far."""
    return {p.fqn: float(p.numel) for p in costs.parameters if p.status == "selectable"}


def read_importance(path: Path, costs: BackwardCosts) -> dict[str, float]:
    """The importances that the last selection of a run measured; 0 for what it did not measure.

    Raises:
        ValueError: the file is not that of an adaptive run of this model.
    """
    measured = measured_importance(path)
    if unknown := sorted(measured.keys() - costs.fqns):
        raise ValueError(f"{path} is of another model: it names {unknown[0]}, which this one does not train")
    return {fqn: measured.get(fqn, 0.0) for fqn in sorted(costs.fqns)}


def measured_importance(path: Path) -> dict[str, float]:
    """What the last selection in a run's `selections.json` measured, by FQN.

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
        raise ValueError(f"{path} holds no importances; only a run with --method adaptive measures them")
    return measured
