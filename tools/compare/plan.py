"""The runs of a comparison in order, and what those that are missing will cost."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.options import CompareOptions
from gtcompile.tools.compare.records import Row
from gtcompile.tools.compare.report import name_of
from gtcompile.tools.compare.run import Run, Training
from gtcompile.tools.compare.setting import Costs, Setting

_SEARCHED = (0.5, 1.0, 2.0)
"""Factors of a method's known learning rate that a search tries."""
_ANSWERED = 16
"""Texts that are scored to measure how long that takes."""


def planned(options: CompareOptions, finish: Callable[[Run], Row]) -> Iterator[Run]:
    """The runs in order: all methods with the first seed before any with the next.

    Args:
        options: of the comparison.
        finish: returns the result of a run on which later ones depend.
    """
    for seed, purpose, name in product(options.seeds, options.purposes, options.arms):
        for budget in options.budgets if ARMS[name].budgeted else [None]:
            run = Run(
                arm=name,
                budget=budget,
                learning_rate=_learning_rate(name, budget, options, finish),
                seed=seed,
                steps=options.steps,
                purpose="steps",
            )
            yield run if purpose == "steps" else _with_equal_flops(run, options, finish)


def _with_equal_flops(run: Run, options: CompareOptions, finish: Callable[[Run], Row]) -> Run:
    """The run with as many steps as the FLOPs of full fine-tuning pay for; all seeds have as many."""
    fraction = finish(replace(run, seed=options.seeds[0]))["flops_fraction"]
    return replace(run, steps=round(options.steps / fraction), purpose="flops")


def _learning_rate(
    name: str, budget: float | None, options: CompareOptions, finish: Callable[[Run], Row]
) -> float:
    """The arm's known learning rate, or the best of three on data of their own."""
    arm = ARMS[name]
    if not options.search:
        return arm.learning_rate
    tried = [
        Run(
            arm=name,
            budget=budget,
            learning_rate=factor * arm.learning_rate,
            seed=options.seeds[0],
            steps=max(1, options.steps // 4),
            purpose="search",
        )
        for factor in _SEARCHED
    ]
    return min(tried, key=lambda chosen: finish(chosen)["loss"]).learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Runs that are missing, and their FLOPs."""

    runs: tuple[Run, ...]
    finished: int
    """How many of the planned runs are there already."""
    training_flops: int
    """Of all steps; measuring importance is not included, and what a cache saves is not subtracted."""
    evaluation_flops: int
    """Of measuring losses."""
    scored: int
    """How many of the runs also measure the metric of the data set."""

    def __str__(self) -> str:
        there = f" ({self.finished} are finished)" if self.finished else ""
        return (
            f"{_counted(len(self.runs), 'run')} to do{there}: {self.training_flops:.3g} FLOPs of training "
            f"steps and {self.evaluation_flops:.3g} of measuring losses"
        )

    def methods(self) -> Iterator[str]:
        """Each method with its length and the number of its runs."""
        counts = Counter((_name(run), run.steps, run.purpose == "search") for run in self.runs)
        for (name, steps, searching), count in counts.items():
            why = " to choose the learning rate" if searching else ""
            yield f"  {name}: {_counted(count, 'run')} of {_counted(steps, 'step')}{why}"


def missing_work(
    options: CompareOptions, finished: Mapping[str, Row], setting: Setting, costs: Costs
) -> Work:
    """The missing runs with their FLOPs, by the budgets and by captured costs; nothing is trained.

    Args:
        options: of the comparison.
        finished: runs by key.
        setting: of the comparison.
        costs: of the methods.
    """
    missing: dict[str, Run] = {}
    known: set[str] = set()

    def share(run: Run) -> float:
        return run.budget or costs.share(ARMS[run.arm])

    def note(run: Run) -> Row:
        """The result of a run, or of what is missing only its costs; any learning rate costs as much."""
        if run.key in finished:
            known.add(run.key)
            return finished[run.key]
        missing[run.key] = run
        return {"loss": 0.0, "flops_fraction": share(run)}

    for run in planned(options, note):
        note(run)
    runs = tuple(missing.values())
    batches = -(-setting.held_out // setting.batches.size) * setting.evaluations * len(runs)
    return Work(
        runs=runs,
        finished=len(known),
        training_flops=round(sum(run.steps * share(run) * costs.full.full_flops for run in runs)),
        evaluation_flops=batches * costs.full.forward_flops,
        scored=sum(run.purpose != "search" for run in runs) if setting.scored else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast this machine runs the comparison."""

    flops_per_second: float
    """Of training steps."""
    starting_seconds: float
    """Of loading, capturing and compiling, once a run."""
    scoring_seconds: float
    """Of measuring the metric of the data set once."""
    origin: str
    """What was measured, in words."""

    def seconds(self, work: Work) -> float:
        """About how long the work takes."""
        steps = (work.training_flops + work.evaluation_flops) / self.flops_per_second
        return steps + self.starting_seconds * len(work.runs) + self.scoring_seconds * work.scored


def remembered_speed(rows: Sequence[Row]) -> Speed:
    """How fast finished runs were, the time of compiling included.

    Args:
        rows: at least one.
    """
    return Speed(
        flops_per_second=sum(row["flops"] for row in rows) / sum(row["seconds"] for row in rows),
        starting_seconds=fmean(row["starting_seconds"] for row in rows),
        scoring_seconds=max(row["scoring_seconds"] for row in rows),
        origin=f"as fast as the {len(rows)} finished",
    )


def measured_speed(run: Run, setting: Setting, costs: Costs) -> Speed:
    """Take two steps of a run, and score a few texts where that is asked for; nothing is kept.

    The second step is timed; the first one compiles.
    """
    times = [time.perf_counter()]
    training = Training(run, setting, costs)
    flops = []
    for _ in range(2):
        training.advance()
        flops.append(training.flops)
        times.append(time.perf_counter())
    answered = min(setting.scored, _ANSWERED)
    training.score(answered)
    scoring = time.perf_counter() - times[-1]
    return Speed(
        flops_per_second=(flops[1] - flops[0]) / (times[2] - times[1]),
        starting_seconds=times[1] - times[0],
        scoring_seconds=scoring * setting.scored / answered if answered else 0.0,
        origin="judged by two steps that were just taken",
    )


def in_words(seconds: float) -> str:
    """A duration in words.

    >>> in_words(45), in_words(600), in_words(9000)
    ('45 s', '10 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _name(run: Run) -> str:
    return name_of({"arm": run.arm, "budget": run.budget})
