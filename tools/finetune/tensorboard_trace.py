"""A run as TensorBoard shows it: loss and FLOPs by step, what is trained and its importance by selection."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gtcompile.graph.module_paths import block_of_parameter

FOLDER = "tensorboard"
"""In the folder of a run; `tensorboard --logdir RUN` finds it."""
TARGETS = ("tensorboard",)
"""What `--log-to` may name."""


def open_trace(target: str | None, run: Path) -> "TensorBoardTrace | None":
    """The trace that was asked for; nothing is written yet.

    Args:
        target: a name in `TARGETS`, or None for no trace.
        run: the run's folder.

    Raises:
        ValueError: an unknown target.
        ImportError: TensorBoard is not installed.
    """
    if target is None:
        return None
    if target not in TARGETS:
        raise ValueError(f"--log-to: expected {', '.join(TARGETS)}, got {target!r}")
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError('--log-to tensorboard needs it: pip install "gtcompile[tensorboard]"') from error
    return TensorBoardTrace(run / FOLDER)


class TensorBoardTrace:
    """Writes event files; a resumed run hides the steps that it takes again.

    Args:
        folder: of the event files, made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def planned(self, step: int, selection: Mapping[str, Any], fqns: Iterable[str]) -> None:
        """A selection was made.

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
        """A step was taken.

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
        """Write what is not yet on disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Event files are only ever added to: what an interrupted run wrote from here on is hidden.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
