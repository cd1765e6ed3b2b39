"""Steps at several budgets, in time and in memory: hoisted blocks beside eager freezing and plain blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table

from benchmarks.paper.models import build_on_meta, draw_importance
from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.explain import saved_bytes
from gtcompile.selection.selection import Selection, select_parameters
from gtcompile.tools.bench.baselines import (
    Rival,
    Workload,
    eager,
    everything_compiled,
    hoisted_blocks,
    plain_blocks,
)
from gtcompile.tools.bench.measurement import (
    Contender,
    Spread,
    alternate,
    in_turns,
    median_interval,
    ratios,
    spread,
    verdict,
)
from gtcompile.tools.common.step_memory import StepMemory, step_memory

FULL_STEP = 1.03
"""Steps of plain compiled blocks that a full hoisted step may take."""
REST_EAGER = 1.03
"""Steps with the rest of the model compiled too that a step may take: so compiled, it is captured by set."""
ABOVE_FLOPS = 0.06
"""How far the ratio of step times may lie above the ratio of FLOPs."""
STEPS_PER_TURN = 3
"""Steps of which the fastest counts: what else runs on the machine only ever adds."""
PAIRS = 6
"""Of steps per round, in which two rivals with the same set take turns."""
HOISTED, EAGER, PLAIN = "hoisted blocks", "eager freezing", "plain blocks"
REST = "hoisted, rest compiled"
GENERATED = "hoisted, generated random"
"""With Inductor's random numbers instead of eager PyTorch's: a difference where there is dropout."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One rival with one trained set."""

    rival: str
    budget: float
    """Share of a full step's FLOPs asked for; 1.0 trains everything."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two rivals with the same trained set."""

    rival: str
    against: str
    budget: float
    """As of a trial."""


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The rivals of one workload, each with the sets it is to be measured with."""

    rivals: Mapping[str, Rival]
    selections: Mapping[float, Selection]
    """By budget."""
    predicted_saved: Mapping[float, int] = field(default_factory=dict)
    """Bytes saved for backward by budget, by the model's joint graph alone; empty where it was not asked."""

    @property
    def trials(self) -> list[Trial]:
        """What is measured; those that would have to compile for a set, with everything trained alone."""
        everywhere = [rival for rival in (HOISTED, GENERATED, EAGER) if rival in self.rivals]
        budgets = [Trial(rival, budget) for budget in self.selections for rival in everywhere]
        return [Trial(rival, 1.0) for rival in self.rivals] + budgets

    @property
    def duels(self) -> list[Duel]:
        """What is compared step by step: every other rival with eager freezing, hoisted blocks with plain."""
        with_eager = [Duel(t.rival, EAGER, t.budget) for t in self.trials if t.rival != EAGER]
        return with_eager + [Duel(HOISTED, other, 1.0) for other in (PLAIN, REST) if other in self.rivals]

    def prepare(self, budget: float, *rivals: str) -> None:
        """Have some rivals train a budget's set, each a step so that its next one is ordinary.

        The others give their moments up, for no user would have them beside.
        """
        for name, rival in self.rivals.items():
            if name not in rivals:
                rival.forget_moments()
        trained = None if budget == 1.0 else self.selections[budget].trained
        for name in rivals:
            self.rivals[name].switch_and_step(trained)

    def contender(self, trial: Trial) -> Contender:
        """The trial as something to time in turns with others."""
        prepare = functools.partial(self.prepare, trial.budget, trial.rival)
        return Contender(prepare, self.rivals[trial.rival].step)


def set_up(workload: Workload, budgets: Sequence[float], seed: int) -> SteadyState:
    """Select for the budgets, make the rivals, and have each compile whatever its trials need.

    Args:
        workload: what to train.
        budgets: shares of a full step's FLOPs, in (0, 1).
        seed: of the random importances.
    """
    batch = {name: torch.zeros_like(value, device="cpu") for name, value in workload.batch().items()}
    joint = capture(build_on_meta(workload.config()), batch)
    costs = costs_of(joint)
    importance = draw_importance(costs, seed)
    selections = {budget: select_parameters(costs, importance, budget) for budget in budgets}
    makers: dict[str, Callable[[Workload], Rival]] = {
        HOISTED: hoisted_blocks,
        GENERATED: functools.partial(hoisted_blocks, random="compiler"),
        EAGER: eager,
        PLAIN: plain_blocks,
        REST: everything_compiled,
    }
    trained = {1.0: joint.live} | {budget: chosen.trained for budget, chosen in selections.items()}
    steady = SteadyState(
        {name: make(workload) for name, make in makers.items()},
        selections,
        {budget: saved_bytes(joint, fqns) for budget, fqns in trained.items()},
    )
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.rival)
    return steady


def time_steps(steady: SteadyState, rounds: int, device: torch.device) -> dict[Trial, list[float]]:
    """Seconds of the fastest of some ordinary steps of every trial, round by round, the trials in turns."""
    contenders = {trial: steady.contender(trial) for trial in steady.trials}
    return alternate(contenders, rounds, device, STEPS_PER_TURN)


def time_duels(steady: SteadyState, rounds: int, device: torch.device) -> dict[Duel, Spread]:
    """How many times as long one rival's step takes as the other's right beside it: median, its interval."""
    found = {}
    for duel in steady.duels:
        steady.prepare(duel.budget, duel.rival, duel.against)
        one, other = steady.rivals[duel.rival].step, steady.rivals[duel.against].step
        found[duel] = median_interval(in_turns(one, other, PAIRS * rounds, device))
    return found


def measure_memory(steady: SteadyState, device: torch.device) -> dict[Trial, StepMemory]:
    """Memory of an ordinary step of every trial."""
    memory = {}
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.rival)
        memory[trial] = step_memory(steady.rivals[trial.rival], device)
    return memory


def time_table(
    steady: SteadyState,
    times: Mapping[Trial, Sequence[float]],
    duels: Mapping[Duel, Spread],
    device: torch.device,
) -> Table:
    """One row per trial.

    Args:
        steady: what was timed.
        times: of every trial in turns with all others; ratios are quoted with their least and greatest.
        duels: step by step with eager PyTorch; ratios are quoted with the interval of their median.
        device: seconds are told of a GPU alone.
    """
    table = Table(title="Steady state: to own full step (least-greatest), to eager (95 % of the median)")
    table.add_column("rival")
    timed = device.type == "cuda"
    columns = ("budget", "FLOPs", "time to own full step", "to eager, same set", *(("ms",) if timed else ()))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for trial in steady.trials:
        to_full = ratios(times[trial], times[Trial(trial.rival, 1.0)])
        to_eager = duels.get(Duel(trial.rival, EAGER, trial.budget), 1)
        milliseconds = (f"{spread(times[trial]).median * 1e3:.1f}",) if timed else ()
        numbers = (f"{trial.budget:.2f}", f"{flops_share(steady, trial):.3f}", str(to_full), str(to_eager))
        table.add_row(trial.rival, *numbers, *milliseconds)
    return table


def flops_share(steady: SteadyState, trial: Trial) -> float:
    """Share of a full step's FLOPs that the trial's set takes."""
    return 1.0 if trial.budget == 1.0 else steady.selections[trial.budget].step_fraction


def time_verdicts(
    steady: SteadyState, times: Mapping[Trial, Sequence[float]], duels: Mapping[Duel, Spread]
) -> list[str]:
    """One line per target."""

    def said(found: Spread, limit: float) -> str:
        return f"{found}: {verdict(found.median, limit)}"

    lines = [
        f"full training, hoisted over plain blocks {said(duels[Duel(HOISTED, PLAIN, 1.0)], FULL_STEP)}",
        "full training, the rest eager over the rest compiled "
        f"{said(duels[Duel(HOISTED, REST, 1.0)], REST_EAGER)}",
    ]
    for budget, selection in steady.selections.items():
        of_full = ratios(times[Trial(HOISTED, budget)], times[Trial(HOISTED, 1.0)])
        limit = selection.step_fraction + ABOVE_FLOPS
        lines.append(f"budget {budget}, time over a full step's {said(of_full, limit)}")
        for rival in (HOISTED, GENERATED):
            lines.append(
                f"budget {budget}, {rival} over eager {said(duels[Duel(rival, EAGER, budget)], 1.0)}"
            )
    return lines


def memory_table(steady: SteadyState, memory: Mapping[Trial, StepMemory]) -> Table:
    """One row per trial."""
    table = Table(title="MB beside weights: saved for backward, as predicted and measured; peak of a step")
    table.add_column("rival")
    for column in ("budget", "predicted", "saved", "share", "peak", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial, used in memory.items():
        full = memory[Trial(trial.rival, 1.0)]
        predicted = f"{steady.predicted_saved[trial.budget] / 1e6:.1f}"
        saved = (predicted, f"{used.saved / 1e6:.1f}", f"{used.saved / full.saved:.3f}")
        peak = (f"{used.peak / 1e6:.1f}", f"{used.peak / full.peak:.3f}")
        table.add_row(trial.rival, f"{trial.budget:.2f}", *saved, *peak)
    return table


def memory_verdicts(memory: Mapping[Trial, StepMemory]) -> list[str]:
    """One line per budget and kind: never more than eager freezing with the same set."""
    lines = []
    for trial, used in memory.items():
        if trial.rival == HOISTED:
            eagers = memory[Trial(EAGER, trial.budget)]
            saved, peak = used.saved / eagers.saved, used.peak / eagers.peak
            where = f"budget {trial.budget}"
            lines.append(f"{where}, saved for backward over eager's {saved:.3f}: {verdict(saved, 1.0)}")
            lines.append(f"{where}, peak over eager's {peak:.3f}: {verdict(peak, 1.0)}")
    return lines
