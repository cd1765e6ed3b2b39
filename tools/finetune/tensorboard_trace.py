"""A TensorBoard trace of a run: loss and FLOPs by step, trained set and importance by selection."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gtcompile.graph.module_paths import block_of_parameter
from gtcompile.tools.finetune.options import check_log_target

FOLDER = "tensorboard"
"""Folder of the trace within that of the run; `tensorboard --logdir RUN` finds it."""


def open_trace(target: str | None, run: Path) -> "TensorBoardTrace | None":
    """Make the trace of a run; nothing is written yet.

    Args:
        target: a name in `LOG_TARGETS`, or None for no trace.
        run: the run's folder.

    Raises:
        ValueError: an unknown target.
        ImportError: TensorBoard is not installed.
    """
    check_log_target(target)
    if target is None:
        return None
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError('--log-to tensorboard needs it: pip install "gtcompile[tensorboard]"') from error
    return TensorBoardTrace(run / FOLDER)


class TensorBoardTrace:
    """Writes event files; a resumed run hides the old events of steps that it takes again.

    Args:
        folder: for the event files; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def selected(self, step: int, selection: Mapping[str, Any], fqns: Iterable[str]) -> None:
        """Record a selection.

        Args:
            step: steps taken before it.
            selection: as in `selections.json`.
            fqns: of every parameter of the model.
        """
        full, importance, trained = selection["full_flops"], selection["importance"], selection["trained"]
        values = {
            "selection/parameters": len(trained),
            "flops/predicted_share": selection["step_flops"] / full,
            "flops/counted_share": selection["counted_step_flops"] / full,
            "flops/budget_share": selection["budget_flops"] / full,
        }
        blocks: dict[str, list[str]] = {}
        for fqn in fqns:
            blocks.setdefault(block_of_parameter(fqn), []).append(fqn)
        chosen = frozenset(trained)
        for block, members in blocks.items():
            values[f"trained/{block}"] = len(chosen.intersection(members))
        if importance:
            values["selection/importance"] = sum(importance.get(fqn, 0.0) for fqn in trained)
            values["selection/importance_bound"] = selection["importance_bound"]
            for block, members in blocks.items():
                values[f"importance/{block}"] = sum(importance.get(fqn, 0.0) for fqn in members)
        self._write(step, values)
        self._writer.add_text("selection/trained", "  \n".join(trained), step)
        self._writer.flush()

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Record a step.

        Args:
            record: as in `metrics.jsonl`.
        """
        names = {
            "train/loss": "loss",
            "train/lr": "lr",
            "train/seconds": "seconds",
            "flops/predicted": "flops",
        }
        self._write(record["step"], {name: record[key] for name, key in names.items()})

    def close(self) -> None:
        """Write everything to disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # event files only grow, so later events of an interrupted run are hidden
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
