"""The tables of finished runs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from gtcompile.tools.compare.records import Row

BASELINE = "full"
LOSS = "loss"
DIGITS = {LOSS: 4}
"""Decimals of a measured value; 2 where nothing is said, for percentages."""


@dataclass(frozen=True, slots=True)
class Value:
    """One measured value of a method: the loss or a score, over its seeds."""

    mean: float
    difference: float | None
    """Mean of the value minus that of full fine-tuning with the same seed; None without common seeds."""
    interval: float | None
    """Half the width of its 95 % interval; None for fewer than two common seeds."""


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
    values: Mapping[str, Value]
    """By the name of what is measured: the loss in nats per token, scores in percent."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table in words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        return f"## {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables_of(compared: Sequence[Row]) -> list[Table]:
    """A table at equal steps and one at equal FLOPs, each only if it has runs."""
    titles = {"At equal steps": "steps", "At equal FLOPs": "flops"}
    chosen = {title: _with_baseline(compared, purpose) for title, purpose in titles.items()}
    return [_table(title, summarise(rows)) for title, rows in chosen.items() if rows]


def write_table(tables: Sequence[Table], folder: Path) -> None:
    """Write `table.md` into the folder."""
    text = ["# Results on held-out texts\n", *(table.markdown() for table in tables)]
    (folder / "table.md").write_text("\n".join(text), "utf-8")


def summarise(rows: Iterable[Row]) -> list[Line]:
    """The table's lines: full fine-tuning first, then by loss."""
    groups: defaultdict[tuple[str, float, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[name_of(row), row["learning_rate"], row["steps"]].append(row)
    baseline = {row["seed"]: values_of(row) for g in groups.values() for row in g if _is_baseline(row)}
    lines = [_line(*key, group, baseline) for key, group in groups.items()]
    return sorted(lines, key=lambda line: (line.name != BASELINE, line.values[LOSS].mean))


def name_of(row: Row) -> str:
    """A method with its budget, such as `best at 0.5`."""
    return row["arm"] if row["budget"] is None else f"{row['arm']} at {row['budget']:g}"


def values_of(row: Row) -> dict[str, float]:
    """Everything that a run measured at its end on held-out texts: the loss and, if asked for, scores."""
    return {LOSS: row["loss"], **row["scores"]}


def paired_interval(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, by Student's t; None for fewer than two numbers."""
    count = len(differences)
    if count < 2:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    return float(stats.t.ppf(0.975, count - 1)) * error


def _line(
    name: str, rate: float, steps: int, group: Sequence[Row], baseline: Mapping[int, Mapping[str, float]]
) -> Line:
    return Line(
        name=name,
        learning_rate=rate,
        steps=steps,
        seeds=len(group),
        flops_fraction=float(np.mean([row["flops_fraction"] for row in group])),
        values={metric: _value(metric, group, baseline) for metric in values_of(group[0])},
    )


def _value(metric: str, group: Sequence[Row], baseline: Mapping[int, Mapping[str, float]]) -> Value:
    own = [values_of(row)[metric] for row in group]
    differences = [
        value - baseline[row["seed"]][metric]
        for row, value in zip(group, own, strict=True)
        if row["seed"] in baseline and not _is_baseline(row)
    ]
    return Value(
        float(np.mean(own)),
        float(np.mean(differences)) if differences else None,
        paired_interval(differences),
    )


def _is_baseline(row: Row) -> bool:
    return bool(row["arm"] == BASELINE)


def _with_baseline(rows: Sequence[Row], purpose: str) -> list[Row]:
    """Runs for a purpose, and full fine-tuning, which is the same run for both purposes."""
    if all(row["purpose"] != purpose for row in rows):
        return []
    return [row for row in rows if row["purpose"] == purpose or _is_baseline(row)]


def _table(title: str, lines: Sequence[Line]) -> Table:
    head = ["trained", "learning rate", "steps", "seeds", "FLOPs per step"]
    for metric in lines[0].values:
        head += [metric if metric == LOSS else f"{metric}, %", "minus full (95 % interval)"]
    rows = []
    for line in lines:
        row = [line.name, f"{line.learning_rate:g}", str(line.steps), str(line.seeds)]
        row.append(f"{line.flops_fraction:.3f}")
        for metric, value in line.values.items():
            digits = DIGITS.get(metric, 2)
            row += [f"{value.mean:.{digits}f}", _difference(value, digits)]
        rows.append(tuple(row))
    return Table(title, tuple(head), tuple(rows))


def _difference(value: Value, digits: int) -> str:
    if value.difference is None:
        return ""
    interval = "one seed" if value.interval is None else f"± {value.interval:.{digits}f}"
    return f"{value.difference:+.{digits}f} ({interval})"
