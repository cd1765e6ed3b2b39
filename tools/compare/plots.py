"""Plots of finished runs; they need matplotlib, which is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt

from gtcompile.tools.compare.records import Row
from gtcompile.tools.compare.report import LOSS, name_of, values_of

_LOSS_LABEL = "loss on held-out texts, nats per token"


def write_plots(compared: Sequence[Row], folder: Path) -> list[str]:
    """Write each plot as SVG and PNG into the folder; returns their names.

    Args:
        compared: runs, at least one; memory and scores are plotted where all of them measured it.
        folder: an existing one.
    """
    plots = {
        "loss_by_flops": _course(compared, "FLOPs", lambda row: row["flops"]),
        "loss_by_seconds": _course(compared, "seconds", lambda row: row["seconds"]),
    }
    if all(row["peak_memory_bytes"] for row in compared):
        plots["loss_by_memory"] = _by_memory(compared)
    if len(values_of(compared[0])) > 1:
        plots["scores_by_flops"] = _scores(compared)
    for name, figure in plots.items():
        for kind in ("svg", "png"):
            figure.savefig(folder / f"{name}.{kind}", dpi=150)
        plt.close(figure)
    return list(plots)


def _course(rows: Sequence[Row], label: str, cost: Any) -> Any:
    """Loss in the course of the longest runs of every method and learning rate, as a mean over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(_name_and_rate(row, rows) for row in rows):
        own = [row for row in rows if _name_and_rate(row, rows) == method]
        longest = [row for row in own if row["steps"] == max(row["steps"] for row in own)]
        points = [[(cost(e), e["loss"]) for e in row["evaluations"]] for row in longest]
        xs, ys = np.mean(np.array(points), axis=0).T
        axes.plot(xs, ys, marker="o", markersize=3, label=f"{method} ({_seeds(len(longest))})")
    axes.set(xlabel=f"{label} of training", ylabel=_LOSS_LABEL)
    axes.legend(fontsize="small", loc="upper right")
    return figure


def _by_memory(rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(map(name_of, rows)):
        own = [row for row in rows if name_of(row) == method]
        memory = max(row["peak_memory_bytes"] for row in own) / 2**30
        axes.plot(memory, np.mean([row["loss"] for row in own]), "o", label=method)
    axes.set(xlabel="peak memory, GiB", ylabel=_LOSS_LABEL)
    axes.legend(fontsize="small", loc="upper right")
    return figure


def _scores(rows: Sequence[Row]) -> Any:
    """Each score at the end: a point per method and length, and a line from its worst to its best seed."""
    metrics = [name for name in values_of(rows[0]) if name != LOSS]
    size = (4 * len(metrics) + 3, 4)
    figure, panels = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for metric, axes in zip(metrics, panels[0], strict=True):
        for index, method in enumerate(dict.fromkeys(_name_and_rate(row, rows) for row in rows)):
            own = [row for row in rows if _name_and_rate(row, rows) == method]
            for number, steps in enumerate(sorted({row["steps"] for row in own})):
                group = [row for row in own if row["steps"] == steps]
                values = [row["scores"][metric] for row in group]
                mean, flops = np.mean(values), np.mean([row["flops"] for row in group])
                spread = [[mean - min(values)], [max(values) - mean]]
                label = None if number else f"{method} ({_seeds(len(group))})"
                axes.errorbar(flops, mean, yerr=spread, fmt="o", capsize=3, color=f"C{index}", label=label)
        axes.set(xlabel="FLOPs of training", title=f"{metric}, %")
        axes.margins(0.15)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    return figure


def _name_and_rate(row: Row, rows: Sequence[Row]) -> str:
    """The method of a run, with its learning rate if the method was run with several."""
    name = name_of(row)
    rates = {other["learning_rate"] for other in rows if name_of(other) == name}
    return name if len(rates) == 1 else f"{name}, learning rate {row['learning_rate']:g}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
