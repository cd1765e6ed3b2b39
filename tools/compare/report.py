"""The table of finished runs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from gtcompile.tools.compare.records import Row

BASELINE = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method in the table, over its seeds."""

    name: str
    """The method, with its budget."""
    learning_rate: float
    steps: int
    seeds: int
    flops_fraction: float
    """Mean FLOPs as a share of those of full fine-tuning in as many steps."""
    loss: float
    """Mean loss on the held-out texts, in nats per token."""
    difference: float | None
    """Mean of loss minus that of full fine-tuning with the same seed; None without common seeds."""
    interval: float | None
    """Half the width of its 95 % interval; None for fewer than two common seeds."""


def write_table(compared: Sequence[Row], folder: Path) -> None:
    """Write `table.md` into the folder."""
    text = ["# Loss on held-out texts\n"]
    for title, chosen in (("equal steps", _at_equal_steps), ("equal FLOPs", _at_equal_flops)):
        lines = summarise(chosen(compared))
        text.append(f"## At {title}\n\n{_table(lines)}")
    (folder / "table.md").write_text("\n".join(text), "utf-8")


def summarise(rows: Iterable[Row]) -> list[Line]:
    """The table's lines: full fine-tuning first, then by loss."""
    groups: defaultdict[tuple[str, float, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[name_of(row), row["learning_rate"], row["steps"]].append(row)
    baseline = {row["seed"]: row["loss"] for group in groups.values() for row in group if _is_baseline(row)}
    lines = [_line(*key, group, baseline) for key, group in groups.items()]
    return sorted(lines, key=lambda line: (line.name != BASELINE, line.loss))


def name_of(row: Row) -> str:
    """A method with its budget, such as `best at 0.5`."""
    return row["arm"] if row["budget"] is None else f"{row['arm']} at {row['budget']:g}"


def paired_interval(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, by Student's t; None for fewer than two numbers."""
    count = len(differences)
    if count < 2:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    return float(stats.t.ppf(0.975, count - 1)) * error


def _line(name: str, rate: float, steps: int, group: Sequence[Row], baseline: dict[int, float]) -> Line:
    differences = [row["loss"] - baseline[row["seed"]] for row in group if row["seed"] in baseline]
    is_baseline = _is_baseline(group[0])
    return Line(
        name=name,
        learning_rate=rate,
        steps=steps,
        seeds=len(group),
        flops_fraction=float(np.mean([row["flops_fraction"] for row in group])),
        loss=float(np.mean([row["loss"] for row in group])),
        difference=float(np.mean(differences)) if differences and not is_baseline else None,
        interval=None if is_baseline else paired_interval(differences),
    )


def _is_baseline(row: Row) -> bool:
    return bool(row["arm"] == BASELINE)


def _at_equal_steps(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["purpose"] == "steps"]


def _at_equal_flops(rows: Sequence[Row]) -> list[Row]:
    """Runs as long as full fine-tuning's FLOPs allow, and full fine-tuning itself."""
    return [row for row in rows if row["purpose"] == "flops" or _is_baseline(row)]


def _table(lines: Sequence[Line]) -> str:
    head = (
        "| trained | learning rate | steps | seeds | FLOPs per step | loss | minus full (95 % interval) |\n"
    )
    head += "|---|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {line.name} | {line.learning_rate:g} | {line.steps} | {line.seeds} | {line.flops_fraction:.3f} "
        f"| {line.loss:.4f} | {_difference(line)} |\n"
        for line in lines
    )


def _difference(line: Line) -> str:
    if line.difference is None:
        return ""
    interval = "one seed" if line.interval is None else f"± {line.interval:.4f}"
    return f"{line.difference:+.4f} ({interval})"
