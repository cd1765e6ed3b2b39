"""Steps at several budgets, in time and in memory: hoisted blocks beside eager freezing and plain blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table

from gtcompile.capture import capture
from gtcompile.dependencies import costs_of
from gtcompile.explanations import saved_bytes
from gtcompile.selection import Selection, select_parameters
from gtcompile.tools.measurement import Contender, alternate, fastest_ratio, ratios, spread, verdict
from gtcompile.tools.paper_models import build_on_meta, draw_importance
from gtcompile.tools.rivals import Rival, Workload, eager, everything_compiled, hoisted_blocks, plain_blocks
from gtcompile.tools.step_memory import StepMemory, step_memory

FULL_STEP = 1.03
"""Steps of plain compiled blocks that a full hoisted step may take."""
REST_EAGER = 1.03
"""Steps with the rest of the model compiled too that a step may take: so compiled, it is captured by set."""
ABOVE_FLOPS = 0.06
"""How far the ratio of step times may lie above the ratio of FLOPs."""
STEPS_PER_TURN = 3
"""Steps of which the fastest counts: what else runs on the machine only ever adds."""
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

    def prepare(self, trial: Trial) -> None:
        """Have the trial's set trained, and take a step so that the next one is ordinary.

        The others give their moments up, for no user would have them beside.
        """
        for name, rival in self.rivals.items():
            if name != trial.rival:
                rival.forget_moments()
        trained = None if trial.budget == 1.0 else self.selections[trial.budget].trained
        self.rivals[trial.rival].switch_and_step(trained)


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
        steady.prepare(trial)
    return steady


def time_steps(steady: SteadyState, rounds: int, device: torch.device) -> dict[Trial, list[float]]:
    """Seconds of the fastest of some ordinary steps of every trial, round by round, the trials in turns."""
    contenders = {
        trial: Contender(functools.partial(steady.prepare, trial), steady.rivals[trial.rival].step)
        for trial in steady.trials
    }
    return alternate(contenders, rounds, device, STEPS_PER_TURN)


def measure_memory(steady: SteadyState, device: torch.device) -> dict[Trial, StepMemory]:
    """Memory of an ordinary step of every trial."""
    memory = {}
    for trial in steady.trials:
        steady.prepare(trial)
        memory[trial] = step_memory(steady.rivals[trial.rival], device)
    return memory


def time_table(steady: SteadyState, times: Mapping[Trial, Sequence[float]], device: torch.device) -> Table:
    """One row per trial: median (least-greatest) of its times in each round over those of a full step."""
    table = Table(title="Steady state: median (least-greatest) over the rounds")
    table.add_column("rival")
    timed = device.type == "cuda"
    columns = ("budget", "FLOPs", "time to own full step", "to eager, same set", *(("ms",) if timed else ()))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for trial in steady.trials:
        to_full = ratios(times[trial], times[Trial(trial.rival, 1.0)])
        to_eager = ratios(times[trial], times[Trial(EAGER, trial.budget)])
        milliseconds = (f"{spread(times[trial]).median * 1e3:.1f}",) if timed else ()
        numbers = (f"{trial.budget:.2f}", f"{flops_share(steady, trial):.3f}", str(to_full), str(to_eager))
        table.add_row(trial.rival, *numbers, *milliseconds)
    return table


def flops_share(steady: SteadyState, trial: Trial) -> float:
    """Share of a full step's FLOPs that the trial's set takes."""
    return 1.0 if trial.budget == 1.0 else steady.selections[trial.budget].step_fraction


def time_verdicts(steady: SteadyState, times: Mapping[Trial, Sequence[float]]) -> list[str]:
    """One line per target."""

    def against(one: Trial, other: Trial, limit: float) -> str:
        found = ratios(times[one], times[other])
        fastest = fastest_ratio(times[one], times[other])
        return f"{found}, fastest rounds {fastest:.3f}: {verdict(found.median, limit)}"

    everything = Trial(HOISTED, 1.0)
    plain = against(everything, Trial(PLAIN, 1.0), FULL_STEP)
    rest = against(everything, Trial(REST, 1.0), REST_EAGER)
    lines = [
        f"full training, hoisted over plain blocks {plain}",
        f"full training, the rest eager over the rest compiled {rest}",
    ]
    for budget, selection in steady.selections.items():
        limit = selection.step_fraction + ABOVE_FLOPS
        lines.append(
            f"budget {budget}, time over a full step's {against(Trial(HOISTED, budget), everything, limit)}"
        )
        for rival in (HOISTED, GENERATED):
            over = against(Trial(rival, budget), Trial(EAGER, budget), 1.0)
            lines.append(f"budget {budget}, {rival} over eager {over}")
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
