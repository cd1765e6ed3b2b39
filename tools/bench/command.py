"""What `gtcompile bench` measures: steps at several budgets beside full training and eager freezing."""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.paper.models import draw_importance
from benchmarks.steady_state import (
    EAGER,
    HOISTED,
    PLAIN,
    STEPS_PER_TURN,
    SteadyState,
    Trial,
    time_steps,
)
from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.selection.selection import select_parameters
from gtcompile.state.trained_set import train_only
from gtcompile.tools.bench.baselines import Rival, Trained, compilations, eager, plain_blocks
from gtcompile.tools.bench.measurement import Spread, describe_machine, ratios, seconds, spread
from gtcompile.tools.common.flop_meter import count_step_flops
from gtcompile.tools.common.known_importances import read_importance
from gtcompile.tools.common.step_memory import saved_bytes
from gtcompile.tools.common.subject import Subject, find_subject
from gtcompile.tools.common.terminal import say
from gtcompile.tools.runs.settings import Compiler

NAMES = {HOISTED: "gtcompile", EAGER: "eager PyTorch", PLAIN: "torch.compile"}
"""What the rivals of `steady_state` are called here."""
NEW_SETS = 3
"""Sets, drawn anew, whose first step is timed."""
ORDINARY_STEPS = 3
"""Steps after each of those; their median is the ordinary step."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights can be cast to."""
SHORT_STEP = 0.02
"""Seconds; most of a shorter step is the calling of operators, which costs the same whatever is trained."""
DISSENT = 9
"""One round in so many may say the opposite before a difference is called a tie (p < 0.05 at nine)."""
DECIDING = 5
"""Fewer rounds decide nothing, even where all say the same."""


TOO_SHORT = (
    "these steps are short: most of one is the calling of operators, not their work, so this says little of "
    "larger ones; raise --batch-size or --length"
)
TOO_FEW = f"fewer than {DECIDING} rounds cannot tell what is faster; raise --rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rival with one trained set."""

    trial: Trial
    """Which."""
    predicted_flops: int
    """Of one step, by the costs."""
    counted_flops: int
    """Of one step, as executed."""
    saved_bytes: int
    """Kept from the forward for the backward."""
    seconds: tuple[float, ...]
    """Of an ordinary step, by round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that was measured of one model."""

    subject: str
    """The model and its batch in one line."""
    machine: str
    """What it was measured on."""
    sets: str
    """Where the trained sets come from."""
    full_flops: int
    """Of one step that trains everything."""
    trials: tuple[Measured, ...]
    """Everything trained first, by rival, then the budgets."""
    new_sets: Spread
    """First steps with a new set, in ordinary steps with the same set, of gtcompile."""
    compiled: int
    """Graphs that those first steps compiled."""
    timed: bool
    """Whether seconds are told: on a GPU, which nobody shares."""

    def find(self, rival: str, budget: float) -> Measured:
        """The measurement of one rival with one set."""
        return next(m for m in self.trials if m.trial == Trial(rival, budget))

    def over(self, measured: Measured, budget: float) -> Spread:
        """Step time over eager PyTorch's with another budget's set, round by round."""
        return ratios(measured.seconds, self.find(EAGER, budget).seconds)

    def verdicts(self) -> list[str]:
        """For everything and for every budget, whether gtcompile wins, ties or loses, in words."""
        lines = []
        for ours in (m for m in self.trials if m.trial.rival == HOISTED):
            what = _called(ours.trial.budget)
            for other in self.trials:
                if other.trial.rival != HOISTED and other.trial.budget in (1.0, ours.trial.budget):
                    against = f"{NAMES[other.trial.rival]}, {_called(other.trial.budget)}"
                    lines.append(f"{what}: {compare(ours.seconds, other.seconds)} {against}")
            if ours.counted_flops != ours.predicted_flops:
                counts = f"{ours.counted_flops} FLOPs counted, {ours.predicted_flops} predicted"
                lines.append(f"{what}: {counts}: the costs do not describe this model")
        new = f"first step with a new set: {self.new_sets} ordinary steps, {self.compiled} graphs compiled"
        short = spread(self.find(EAGER, 1.0).seconds).median < SHORT_STEP
        few = len(self.find(EAGER, 1.0).seconds) < DECIDING
        return [*lines, new, *([TOO_FEW] if few else []), *([TOO_SHORT] if short else [])]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "model": self.subject,
            "machine": self.machine,
            "sets": self.sets,
            "full_flops": self.full_flops,
            "trials": [self._row(measured) for measured in self.trials],
            "first_step_with_a_new_set": _plain(self.new_sets),
            "compiled_for_new_sets": self.compiled,
            "verdicts": self.verdicts(),
        }

    def _row(self, measured: Measured) -> dict[str, Any]:
        row = {
            "rival": NAMES[measured.trial.rival],
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
    """Faster, slower or a tie, and by how much; from times of the same rounds.

    A difference counts where no more than one round in nine says the opposite, of at least `DECIDING`.
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


def bench(
    name: str,
    budgets: Sequence[float],
    *,
    compiler: Compiler,
    rounds: int = DISSENT,
    importances: Path | None = None,
    progress: Console | None = None,
    dtype: str | None = None,
    **shape: int,
) -> Bench:
    """Measure full training and the budgets, the rivals taking turns in this process.

    Args:
        name: hub id, directory (a configuration is enough: weights are random), `demo`, or `module:function`.
        budgets: shares of a full step's FLOPs, in (0, 1).
        compiler: of gtcompile; with `inductor`, blocks compiled by `torch.compile` alone are a rival too.
        rounds: times every trial is timed.
        importances: `selections.json` of a run of this model; None draws importances at random.
        progress: where to say how long it will take.
        dtype: of the weights, one of `DTYPES`; None takes float32, or what a factory returns.
        **shape: `batch_size` rows of `length` tokens, `target_length` answer tokens of an encoder-decoder.

    Raises:
        ValueError: an argument is wrong, or there is no such model.
        GTCompileError: the model cannot be captured, or a budget is too small.
    """
    _check(budgets, shape | {"rounds": rounds})
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = find_subject(name, device, dtype=DTYPES[dtype] if dtype else None, **shape)
    rivals = _rivals(subject, compiler)
    costs = backward_costs(rivals[HOISTED].callable, subject.example)  # with what its blocks return
    importance = draw_importance(costs, 0) if importances is None else read_importance(importances, costs)
    selections = {budget: select_parameters(costs, importance, budget) for budget in budgets}
    middle = sorted(budgets)[len(budgets) // 2]
    fresh = [
        select_parameters(costs, draw_importance(costs, seed), middle).trained
        for seed in range(1, NEW_SETS + 1)
    ]
    steady = SteadyState(rivals, selections)
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.rival)
    _announce(steady, rounds, device, progress)
    times = time_steps(steady, rounds, device)
    predicted = {budget: selection.step_flops for budget, selection in selections.items()}
    predicted[1.0] = costs.full_flops
    trials = [_measure(steady, t, predicted[t.budget], times[t]) for t in steady.trials]
    before = compilations()
    new_sets = _time_first_steps(steady.rivals[HOISTED], fresh, device)
    return Bench(
        subject=str(subject),
        machine=describe_machine(device),
        sets="the best for random importances" if importances is None else f"the best by {importances}",
        full_flops=costs.full_flops,
        trials=tuple(trials),
        new_sets=new_sets,
        compiled=(compilations() - before).compiled,
        timed=device.type == "cuda",
    )


def _check(budgets: Sequence[float], counts: dict[str, int]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    wrong = [budget for budget in budgets if not 0 < budget < 1]
    if wrong or not budgets:
        raise ValueError(
            f"--budgets: expected shares between 0 and 1 with commas between, such as 0.4,0.5, got "
            f"{', '.join(f'{b:g}' for b in wrong) or 'none'}; everything trained is always measured"
        )


def _rivals(subject: Subject, compiler: Compiler) -> dict[str, Rival]:
    """The model itself, compiled by gtcompile, and by torch where that generates code."""
    has_blocks = any(True for _ in find_blocks(subject.original))
    options = {"compiler": compiler, "variants": "hoisted"}
    if has_blocks:
        prepare = functools.partial(compile_blocks, compiler=compiler)
    else:
        prepare = functools.partial(_compile_whole, options=options)
    rivals = {HOISTED: Rival(subject, prepare, train_only), EAGER: eager(subject)}
    if compiler == "inductor" and has_blocks:
        rivals[PLAIN] = plain_blocks(subject)
    return rivals


def _compile_whole(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="gtcompile", options=options)  # type: ignore[assignment]
    return compiled


def _announce(steady: SteadyState, rounds: int, device: torch.device, progress: Console | None) -> None:
    if progress is not None:
        each = seconds(functools.partial(steady.prepare, 1.0, EAGER), device)
        steps = (1 + STEPS_PER_TURN) * rounds * len(steady.trials)
        say(progress, f"{steps} steps to take, about {steps * each / 60:.1f} minutes")


def _measure(steady: SteadyState, trial: Trial, predicted: int, times: Sequence[float]) -> Measured:
    steady.prepare(trial.budget, trial.rival)
    rival = steady.rivals[trial.rival]
    return Measured(
        trial=trial,
        predicted_flops=predicted,
        counted_flops=count_step_flops(rival.callable, rival.batch),
        saved_bytes=saved_bytes(rival.loss, rival.model),
        seconds=tuple(times),
    )


def _time_first_steps(rival: Rival, sets: Sequence[Trained], device: torch.device) -> Spread:
    ratio = []
    for trained in sets:
        first = seconds(functools.partial(rival.switch_and_step, trained), device)
        ordinary = statistics.median(seconds(rival.step, device) for _ in range(ORDINARY_STEPS))
        ratio.append(first / ordinary)
    return spread(ratio)


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
        itself = m.trial.rival == EAGER
        times = (
            "1" if itself and budget == 1.0 else _short(result.over(m, 1.0)),
            "1" if itself else _short(result.over(m, budget)),
        )
        saved = f"{m.saved_bytes / full.saved_bytes:.2f}" if full.saved_bytes else str(m.saved_bytes)
        milliseconds = (f"{spread(m.seconds).median * 1e3:.1f}",) if result.timed else ()
        table.add_row(NAMES[m.trial.rival], f"{budget:.2f}", flops, *times, saved, *milliseconds)
    say(console, result.subject, result.machine, f"trained sets: {result.sets}")
    console.print(table)
    say(console, *result.verdicts())


def _short(values: Spread) -> str:
    return f"{values.median:.2f} ({values.low:.2f}-{values.high:.2f})"
