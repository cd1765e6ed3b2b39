"""Plots of finished runs; they need matplotlib, which is optional."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt

from gtcompile.tools.compare.records import Row
from gtcompile.tools.compare.report import name_of


def write_plots(compared: Sequence[Row], folder: Path) -> None:
    """Write each plot as SVG and PNG into the folder.

    Args:
        compared: runs, at least one; memory is plotted where all of them measured it.
        folder: an existing one.
    """
    _plot(compared, folder, "flops", "FLOPs", lambda row: row["flops"])
    _plot(compared, folder, "seconds", "seconds", lambda row: row["seconds"])
    if all(row["peak_memory_bytes"] for row in compared):
        _plot_memory(compared, folder)


def _plot(rows: Sequence[Row], folder: Path, name: str, label: str, cost: Any) -> None:
    """Loss in the course of the longest runs of every method and learning rate, as a mean over seeds."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(_name_and_rate(row, rows) for row in rows):
        own = [row for row in rows if _name_and_rate(row, rows) == method]
        longest = [row for row in own if row["steps"] == max(row["steps"] for row in own)]
        points = [[(cost(e), e["loss"]) for e in row["evaluations"]] for row in longest]
        xs, ys = np.mean(np.array(points), axis=0).T
        axes.plot(xs, ys, marker="o", markersize=3, label=f"{method} ({_seeds(len(longest))})")
    axes.set(xlabel=f"{label} of training", ylabel="loss on held-out texts, nats per token")
    axes.legend(fontsize="small")
    _save(figure, folder / f"loss_by_{name}")


def _plot_memory(rows: Sequence[Row], folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(map(name_of, rows)):
        own = [row for row in rows if name_of(row) == method]
        memory = max(row["peak_memory_bytes"] for row in own) / 2**30
        axes.plot(memory, np.mean([row["loss"] for row in own]), "o", label=method)
    axes.set(xlabel="peak memory, GiB", ylabel="loss on held-out texts, nats per token")
    axes.legend(fontsize="small")
    _save(figure, folder / "loss_by_memory")


def _save(figure: Any, path: Path) -> None:
    for kind in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)
    plt.close(figure)


def _name_and_rate(row: Row, rows: Sequence[Row]) -> str:
    """The method of a run, with its learning rate if the method was run with several."""
    name = name_of(row)
    rates = {other["learning_rate"] for other in rows if name_of(other) == name}
    return name if len(rates) == 1 else f"{name}, learning rate {row['learning_rate']:g}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
