"""Steps at several budgets, in time and in memory: hoisted blocks, eager freezing and plain blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from benchmarks.measurement import in_turns, median_interval, verdict
from benchmarks.paper.models import build_on_meta
from benchmarks.workloads import Workload, everything_compiled, hoisted_blocks
from gtcompile import select_parameters
from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.explain import saved_bytes as predicted_saved_bytes
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.tools.bench.baselines import Candidate, eager, plain_blocks
from gtcompile.tools.bench.measurement import Spread, ratios, spread
from gtcompile.tools.bench.steady_state import EAGER, HOISTED, PLAIN, SteadyState, Trial
from gtcompile.tools.common.known_importances import draw_importance
from gtcompile.tools.common.step_memory import StepMemory, peak_bytes, saved_bytes

FULL_STEP = 1.03
"""Most time of a full hoisted step, in steps of plain compiled blocks."""
REST_EAGER = 1.03
"""Most time of a step, in steps of a model whose other modules are compiled too."""
ABOVE_FLOPS = 0.06
"""How far the ratio of step times may lie above the ratio of FLOPs."""
PAIRS = 6
"""Pairs of steps per round in which two candidates with the same set take turns."""
REST = "hoisted, rest compiled"
GENERATED = "hoisted, generated random"
"""Hoisted blocks with Inductor's random numbers instead of eager PyTorch's; this matters with dropout."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two candidates with the same trained set, whose steps are compared pair by pair."""

    candidate: str
    against: str
    budget: float
    """Share of a full step's FLOPs that the set was chosen for; 1.0 trains everything."""


def duels(steady: SteadyState) -> list[Duel]:
    """Every other candidate against eager freezing, and hoisted blocks against plain ones."""
    with_eager = [Duel(t.candidate, EAGER, t.budget) for t in steady.trials if t.candidate != EAGER]
    plain = [Duel(HOISTED, other, 1.0) for other in (PLAIN, REST) if other in steady.candidates]
    return with_eager + plain


def joint_of(workload: Workload) -> JointGraph:
    """The joint graph of a workload on its device, captured without weights."""
    return capture(build_on_meta(workload.config()), workload.batch())


def set_up(workload: Workload, budgets: Sequence[float], seed: int) -> SteadyState:
    """Select for the budgets, make the candidates, and let each compile what its trials need.

    Args:
        workload: what to train.
        budgets: shares of a full step's FLOPs, in (0, 1).
        seed: of the random importances.
    """
    costs = costs_of(joint_of(workload))
    importance = draw_importance(costs, seed)
    selections = {budget: select_parameters(costs, importance, budget) for budget in budgets}
    makers: dict[str, Callable[[Workload], Candidate]] = {
        HOISTED: hoisted_blocks,
        GENERATED: functools.partial(hoisted_blocks, random="compiler"),
        EAGER: eager,
        PLAIN: plain_blocks,
        REST: everything_compiled,
    }
    candidates = {name: make(workload) for name, make in makers.items()}
    steady = SteadyState(candidates, selections, full_only=(PLAIN, REST))
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.candidate)
    return steady


def time_duels(steady: SteadyState, rounds: int, device: torch.device) -> dict[Duel, Spread]:
    """Ratio of step times of every duel: median and its 95 % interval."""
    found = {}
    for duel in duels(steady):
        steady.prepare(duel.budget, duel.candidate, duel.against)
        one, other = steady.candidates[duel.candidate].step, steady.candidates[duel.against].step
        found[duel] = median_interval(in_turns(one, other, PAIRS * rounds, device))
    return found


def measure_memory(steady: SteadyState, device: torch.device) -> dict[Trial, StepMemory]:
    """Memory of an ordinary step of every trial."""
    memory = {}
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.candidate)
        memory[trial] = step_memory(steady.candidates[trial.candidate], device)
    return memory


def step_memory(candidate: Candidate, device: torch.device) -> StepMemory:
    """Measure the next step of a candidate; everything that it needs must be compiled."""
    saved = saved_bytes(candidate.loss, candidate.model)
    candidate.forget_moments()
    return StepMemory(saved, peak_bytes(candidate.step, device))


def time_table(
    steady: SteadyState,
    times: Mapping[Trial, Sequence[float]],
    compared: Mapping[Duel, Spread],
    device: torch.device,
) -> Table:
    """One row per trial.

    Args:
        steady: what was timed.
        times: of every trial in turns with all others; ratios are quoted with their least and greatest.
        compared: every duel; ratios to eager PyTorch are quoted with the interval of their median.
        device: seconds are shown for a GPU only.
    """
    table = Table(title="Steady state: to own full step (least-greatest), to eager (95 % of the median)")
    table.add_column("candidate")
    timed = device.type == "cuda"
    columns = ("budget", "FLOPs", "time to own full step", "to eager, same set", *(("ms",) if timed else ()))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for trial in steady.trials:
        to_full = ratios(times[trial], times[Trial(trial.candidate, 1.0)])
        to_eager = compared.get(Duel(trial.candidate, EAGER, trial.budget), 1)
        milliseconds = (f"{spread(times[trial]).median * 1e3:.1f}",) if timed else ()
        numbers = (f"{trial.budget:.2f}", f"{flops_share(steady, trial):.3f}", str(to_full), str(to_eager))
        table.add_row(trial.candidate, *numbers, *milliseconds)
    return table


def flops_share(steady: SteadyState, trial: Trial) -> float:
    """Share of a full step's FLOPs that the trial's set takes."""
    return 1.0 if trial.budget == 1.0 else steady.selections[trial.budget].step_fraction


def time_verdicts(
    steady: SteadyState, times: Mapping[Trial, Sequence[float]], compared: Mapping[Duel, Spread]
) -> list[str]:
    """One line per target."""

    def said(found: Spread, limit: float) -> str:
        return f"{found}: {verdict(found.median, limit)}"

    lines = [
        f"full training, hoisted over plain blocks {said(compared[Duel(HOISTED, PLAIN, 1.0)], FULL_STEP)}",
        "full training, the rest eager over the rest compiled "
        f"{said(compared[Duel(HOISTED, REST, 1.0)], REST_EAGER)}",
    ]
    for budget, selection in steady.selections.items():
        of_full = ratios(times[Trial(HOISTED, budget)], times[Trial(HOISTED, 1.0)])
        limit = selection.step_fraction + ABOVE_FLOPS
        lines.append(f"budget {budget}, time over a full step's {said(of_full, limit)}")
        for name in (HOISTED, GENERATED):
            lines.append(
                f"budget {budget}, {name} over eager {said(compared[Duel(name, EAGER, budget)], 1.0)}"
            )
    return lines


def predicted_saved(workload: Workload, steady: SteadyState) -> dict[float, int]:
    """Bytes saved for backward that the joint graph alone predicts, by budget."""
    joint = joint_of(workload)
    trained = {1.0: joint.live} | {budget: chosen.trained for budget, chosen in steady.selections.items()}
    return {budget: predicted_saved_bytes(joint, fqns) for budget, fqns in trained.items()}


def memory_table(predictions: Mapping[float, int], memory: Mapping[Trial, StepMemory]) -> Table:
    """One row per trial."""
    table = Table(title="MB without weights: saved for backward, predicted and measured; peak of a step")
    table.add_column("candidate")
    for column in ("budget", "predicted", "saved", "share", "peak", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial, used in memory.items():
        full = memory[Trial(trial.candidate, 1.0)]
        predicted = f"{predictions[trial.budget] / 1e6:.1f}"
        saved = (predicted, f"{used.saved / 1e6:.1f}", f"{used.saved / full.saved:.3f}")
        peak = (f"{used.peak / 1e6:.1f}", f"{used.peak / full.peak:.3f}")
        table.add_row(trial.candidate, f"{trial.budget:.2f}", *saved, *peak)
    return table


def memory_verdicts(memory: Mapping[Trial, StepMemory]) -> list[str]:
    """One line per budget and kind: never more than eager freezing with the same set."""
    lines = []
    for trial, used in memory.items():
        if trial.candidate == HOISTED:
            eagers = memory[Trial(EAGER, trial.budget)]
            saved, peak = used.saved / eagers.saved, used.peak / eagers.peak
            where = f"budget {trial.budget}"
            lines.append(f"{where}, saved for backward over eager's {saved:.3f}: {verdict(saved, 1.0)}")
            lines.append(f"{where}, peak over eager's {peak:.3f}: {verdict(peak, 1.0)}")
    return lines
