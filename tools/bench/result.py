"""The measurements of `gtcompile bench`: values, verdicts and the table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gtcompile.tools.bench.measurement import Spread, ratios, spread
from gtcompile.tools.bench.options import ROUNDS
from gtcompile.tools.bench.steady_state import EAGER, HOISTED, PLAIN, Trial
from gtcompile.tools.common.terminal import say

NAMES = {HOISTED: "gtcompile", EAGER: "eager PyTorch", PLAIN: "torch.compile"}
"""Names of the candidates in the output."""
SHORT_STEP = 0.02
"""Seconds. Calling operators takes most of a shorter step, and costs the same for every trained set."""
DISSENT = ROUNDS
"""In this many rounds, one may contradict the others without making it a tie (p < 0.05 at nine)."""
DECIDING = 5
"""Least rounds that can tell what is faster. With fewer, the verdict is `undecided` even if all agree."""
MEASURED_BATCHES = 4
"""Batches on which a selection measures importance, as in the callbacks for trainers."""

TOO_SHORT = (
    "these steps are short: calling operators takes most of the time, so this says little about larger "
    "steps; raise --batch-size or --length"
)
TOO_FEW = f"fewer than {DECIDING} rounds cannot tell what is faster; raise --rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurements of one candidate with one trained set."""

    trial: Trial
    """Candidate and budget."""
    predicted_flops: int
    """FLOPs of one step that the costs predict."""
    counted_flops: int
    """FLOPs that one step executed."""
    saved_bytes: int
    """Bytes saved for backward."""
    seconds: tuple[float, ...]
    """Seconds of an ordinary step in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds of everything that comes before ordinary steps."""

    capturing: float
    """Capturing the step, for its costs; once for each shape of batches."""
    measuring: float
    """Measuring importance on `MEASURED_BATCHES` batches."""
    selecting: float
    """Selecting the best set."""
    compiling: Mapping[str, float]
    """What the first step of a candidate took beyond an ordinary one. Code cached on disk makes it less.
    gtcompile's step comes first, so it also starts the compiler."""

    def before(self, budget: float) -> float:
        """Seconds that gtcompile spends before an ordinary step with a budget; 1.0 needs no selection."""
        selection = 0.0 if budget == 1.0 else self.capturing + self.measuring + self.selecting
        return self.compiling[HOISTED] + selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All measurements of one model."""

    subject: str
    """The model and its batch in one line."""
    machine: str
    """The machine in words."""
    sets: str
    """How the trained sets were chosen."""
    full_flops: int
    """FLOPs of one step that trains everything."""
    trials: tuple[Measured, ...]
    """Everything trained first, then budget by budget."""
    new_sets: Spread
    """gtcompile's first steps with a new set, in ordinary steps with the same set."""
    compiled: int
    """Graphs that these first steps compiled."""
    overhead: Overhead
    """Seconds that come before ordinary steps."""
    timed: bool
    """Whether seconds are shown: only on a GPU, since other work slows steps on a CPU."""

    def find(self, candidate: str, budget: float) -> Measured:
        """The measurements of one candidate with one set."""
        return next(m for m in self.trials if m.trial == Trial(candidate, budget))

    def over(self, measured: Measured, budget: float) -> Spread:
        """Ratio of the step time to that of eager PyTorch with the set of `budget`, round by round."""
        return ratios(measured.seconds, self.find(EAGER, budget).seconds)

    def verdicts(self) -> list[str]:
        """Say for everything trained and for every budget whether gtcompile is faster, slower or equal."""
        lines = []
        for ours in (m for m in self.trials if m.trial.candidate == HOISTED):
            what = _called(ours.trial.budget)
            for other in self.trials:
                if other.trial.candidate != HOISTED and other.trial.budget in (1.0, ours.trial.budget):
                    against = f"{NAMES[other.trial.candidate]}, {_called(other.trial.budget)}"
                    lines.append(f"{what}: {compare(ours.seconds, other.seconds)} {against}")
            if ours.counted_flops != ours.predicted_flops:
                counts = f"{ours.counted_flops} FLOPs counted, {ours.predicted_flops} predicted"
                lines.append(f"{what}: {counts}: the costs do not describe this model")
        new = f"first step with a new set: {self.new_sets} ordinary steps, {self.compiled} graphs compiled"
        short = spread(self.find(EAGER, 1.0).seconds).median < SHORT_STEP
        few = len(self.find(EAGER, 1.0).seconds) < DECIDING
        lines += [self._won_back(m.trial.budget) for m in self.trials if m.trial.candidate == HOISTED]
        return [*lines, self._before(), new, *([TOO_FEW] if few else []), *([TOO_SHORT] if short else [])]

    def won_back_after(self, budget: float) -> int | None:
        """After how many steps gtcompile has saved its overhead, compared with full steps of eager PyTorch.

        None if its steps are not shorter.
        """
        gain = self._full_seconds - spread(self.find(HOISTED, budget).seconds).median
        return math.ceil(self.overhead.before(budget) / gain) if gain > 0 else None

    @property
    def _full_seconds(self) -> float:
        return spread(self.find(EAGER, 1.0).seconds).median

    def _won_back(self, budget: float) -> str:
        steps = self.won_back_after(budget)
        if steps is None:
            ratio = self.over(self.find(HOISTED, budget), 1.0)
            return f"{_called(budget)}: does not pay: a step takes {ratio} full steps of eager PyTorch"
        what = "compiling" if budget == 1.0 else "compiling and selecting"
        return f"{_called(budget)}: {what} is won back after {steps} steps, against eager PyTorch in full"

    def _before(self) -> str:
        """What comes before ordinary steps, in words."""
        taken = self.overhead_over_eager_full()
        compiling = ", ".join(f"{name} {steps:.3g}" for name, steps in taken.pop("compiling").items())
        parts = ", ".join(f"{what} {steps:.3g}" for what, steps in taken.items())
        return (
            f"overhead in full steps of eager PyTorch: {parts} ({MEASURED_BATCHES} batches measured); "
            f"compiling: {compiling}"
        )

    def overhead_over_eager_full(self) -> dict[str, Any]:
        """The overhead as multiples of a full step of eager PyTorch."""
        overhead, step = self.overhead, self._full_seconds
        return {
            "capturing": overhead.capturing / step,
            "measuring": overhead.measuring / step,
            "selecting": overhead.selecting / step,
            "compiling": {NAMES[name]: taken / step for name, taken in overhead.compiling.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        budgets = [m.trial.budget for m in self.trials if m.trial.candidate == HOISTED]
        return {
            "model": self.subject,
            "machine": self.machine,
            "sets": self.sets,
            "full_flops": self.full_flops,
            "trials": [self._row(measured) for measured in self.trials],
            "first_step_with_a_new_set": _plain(self.new_sets),
            "compiled_for_new_sets": self.compiled,
            "overhead_over_eager_full": self.overhead_over_eager_full(),
            "won_back_after": {f"{budget:g}": self.won_back_after(budget) for budget in budgets},
            "verdicts": self.verdicts(),
        }

    def _row(self, measured: Measured) -> dict[str, Any]:
        row = {
            "candidate": NAMES[measured.trial.candidate],
            "budget": measured.trial.budget,
            "predicted_flops": measured.predicted_flops,
            "counted_flops": measured.counted_flops,
            "saved_bytes": measured.saved_bytes,
            "time_over_eager_full": _plain(self.over(measured, 1.0)),
            "time_over_eager_same_set": _plain(self.over(measured, measured.trial.budget)),
        }
        return row | ({"seconds": _plain(spread(measured.seconds))} if self.timed else {})


def _called(budget: float) -> str:
    return "everything trained" if budget == 1.0 else f"budget {budget:g}"


def _plain(values: Spread) -> dict[str, float]:
    return {"median": values.median, "least": values.low, "greatest": values.high}


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Say whether one candidate is faster, slower or equal to another, and by how much.

    There must be at least `DECIDING` rounds, and at most one round in nine may contradict.

    Args:
        ours: seconds by round.
        theirs: seconds in the same rounds.
    """
    ratio, may_dissent = ratios(ours, theirs), len(ours) // DISSENT
    faster = sum(one < other for one, other in zip(ours, theirs, strict=True))
    slower = sum(one > other for one, other in zip(ours, theirs, strict=True))
    if len(ours) < DECIDING:
        return f"undecided, {ratio} of the time of"
    if len(ours) - faster <= may_dissent:
        return f"faster, {ratio} of the time of"
    if len(ours) - slower <= may_dissent:
        return f"SLOWER, {ratio} of the time of"
    return f"a tie, {ratio} of the time of"


def show(console: Console, result: Bench) -> None:
    """Print the table and the verdicts."""
    table = Table(title="Median (least-greatest) over the rounds", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge, table.padding = False, False, (0, 0)
    table.add_column("", no_wrap=True)
    headers = ("budget", "FLOPs\n(counted)", "time over\neager full", "over eager,\nsame set", "saved\nbytes")
    for header in (*headers, *(("ms",) if result.timed else ())):
        table.add_column(header, justify="right", no_wrap=True)
    full = result.find(EAGER, 1.0)
    for m in result.trials:
        budget = m.trial.budget
        flops = "{:.3f} ({:.3f})".format(
            *(f / result.full_flops for f in (m.predicted_flops, m.counted_flops))
        )
        is_eager = m.trial.candidate == EAGER
        times = (
            "1" if is_eager and budget == 1.0 else _short(result.over(m, 1.0)),
            "1" if is_eager else _short(result.over(m, budget)),
        )
        saved = f"{m.saved_bytes / full.saved_bytes:.2f}" if full.saved_bytes else str(m.saved_bytes)
        milliseconds = (f"{spread(m.seconds).median * 1e3:.1f}",) if result.timed else ()
        table.add_row(NAMES[m.trial.candidate], f"{budget:.2f}", flops, *times, saved, *milliseconds)
    say(console, result.subject, result.machine, f"trained sets: {result.sets}")
    console.print(table)
    say(console, *result.verdicts())


def _short(values: Spread) -> str:
    return f"{values.median:.2f} ({values.low:.2f}-{values.high:.2f})"
