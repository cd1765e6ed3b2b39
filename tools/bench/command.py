"""`gtcompile bench`: steps at several budgets, compared with full training and eager freezing."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn

from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.importance.estimators import measure_importance
from gtcompile.selection.selection import parameters_to_measure, select_parameters
from gtcompile.state.trained_set import train_only
from gtcompile.tools.bench.baselines import Candidate, Trained, compilations, eager, plain_blocks
from gtcompile.tools.bench.measurement import Spread, describe_machine, seconds, spread
from gtcompile.tools.bench.options import BenchOptions
from gtcompile.tools.bench.result import MEASURED_BATCHES, Bench, Measured, Overhead
from gtcompile.tools.bench.steady_state import (
    EAGER,
    HOISTED,
    PLAIN,
    STEPS_PER_TURN,
    SteadyState,
    Trial,
    time_steps,
)
from gtcompile.tools.bench.subject import ModelSubject, find_subject
from gtcompile.tools.common.flop_meter import count_step_flops
from gtcompile.tools.common.known_importances import draw_importance, read_importance
from gtcompile.tools.common.step_memory import saved_bytes
from gtcompile.tools.common.terminal import say
from gtcompile.tools.runs.preparation import default_compiler, default_device
from gtcompile.tools.runs.settings import Compiler

NEW_SETS = 3
"""Newly drawn sets whose first step is timed."""
ORDINARY_STEPS = 3
"""Steps after each of those; their median is the ordinary step."""

Value = TypeVar("Value")


def bench(name: str, options: BenchOptions, progress: Console | None = None) -> Bench:
    """Measure full training and every budget, the candidates taking turns in this process.

    Args:
        name: hub id, directory (a configuration is enough: weights are random), `demo`, or `module:function`.
        options: what to measure.
        progress: where to say how long it will take.

    Raises:
        ValueError: there is no such model, or it does not fit the options.
        GTCompileError: the model cannot be captured, or a budget is too small.
    """
    device = torch.device(default_device())
    dtype: torch.dtype | None = getattr(torch, options.dtype) if options.dtype else None
    subject = find_subject(name, device, options.shape, dtype)
    candidates = _candidates(subject, options.compiler or default_compiler())
    # through the compiled module, so that the costs include outputs of blocks that the loss does not use
    ours = candidates[HOISTED]
    costs, capturing = _timed(lambda: backward_costs(ours.callable, subject.example), device)
    path, budgets = options.importances, options.budgets
    importance = draw_importance(costs, 0) if path is None else read_importance(path, costs)
    selections = {budget: select_parameters(costs, importance, budget) for budget in budgets}
    middle = sorted(budgets)[len(budgets) // 2]
    fresh = [
        select_parameters(costs, draw_importance(costs, seed), middle).trained
        for seed in range(1, NEW_SETS + 1)
    ]
    steady = SteadyState(candidates, selections, full_only=(PLAIN,))
    first = {
        trial: seconds(functools.partial(steady.prepare, trial.budget, trial.candidate), device)
        for trial in steady.trials
    }
    measuring, selecting = _time_a_selection(ours, costs, middle, device)  # after the steps that compile
    _announce(steady, options.rounds, device, progress)
    times = time_steps(steady, options.rounds, device)
    predicted = {budget: selection.step_flops for budget, selection in selections.items()}
    predicted[1.0] = costs.full_flops
    trials = [_measure(steady, t, predicted[t.budget], times[t]) for t in steady.trials]
    before = compilations()
    new_sets = _time_first_steps(ours, fresh, device)
    return Bench(
        subject=str(subject),
        machine=describe_machine(device),
        sets="the best for random importances" if path is None else f"the best by {path}",
        full_flops=costs.full_flops,
        trials=tuple(trials),
        new_sets=new_sets,
        compiled=(compilations() - before).compiled,
        overhead=Overhead(
            capturing=capturing,
            measuring=measuring,
            selecting=selecting,
            compiling={
                name: max(first[Trial(name, 1.0)] - statistics.median(times[Trial(name, 1.0)]), 0.0)
                for name in candidates
                if name != EAGER
            },
        ),
        timed=device.type == "cuda",
    )


def _candidates(subject: ModelSubject, compiler: Compiler) -> dict[str, Candidate]:
    """The model compiled by gtcompile, eager, and compiled by torch alone if the compiler generates code."""
    has_blocks = any(True for _ in find_blocks(subject.original))
    options = {"compiler": compiler, "variants": "hoisted"}
    if has_blocks:
        prepare = functools.partial(compile_blocks, compiler=compiler)
    else:
        prepare = functools.partial(_compile_whole, options=options)
    candidates = {HOISTED: Candidate(subject, prepare, train_only), EAGER: eager(subject)}
    if compiler == "inductor" and has_blocks:
        candidates[PLAIN] = plain_blocks(subject)
    return candidates


def _compile_whole(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="gtcompile", options=options)  # type: ignore[assignment]
    return compiled


def _timed(function: Callable[[], Value], device: torch.device) -> tuple[Value, float]:
    """The result of a function, and how many seconds it took."""
    results: list[Value] = []
    taken = seconds(lambda: results.append(function()), device)
    return results[0], taken


def _time_a_selection(
    candidate: Candidate, costs: BackwardCosts, budget: float, device: torch.device
) -> tuple[float, float]:
    """Seconds of measuring importance and of selecting, as the first selection of a training does both."""
    candidate.switch(None)
    wanted = parameters_to_measure(costs, budget)
    batches = [candidate.batch] * MEASURED_BATCHES
    importance, measuring = _timed(
        lambda: measure_importance(candidate.callable, candidate.optimizer, batches, only=wanted), device
    )
    _, selecting = _timed(lambda: select_parameters(costs, importance, budget), device)
    return measuring, selecting


def _announce(steady: SteadyState, rounds: int, device: torch.device, progress: Console | None) -> None:
    if progress is not None:
        each = seconds(functools.partial(steady.prepare, 1.0, EAGER), device)
        steps = (1 + STEPS_PER_TURN) * rounds * len(steady.trials)
        say(progress, f"{steps} steps to take, about {steps * each / 60:.1f} minutes")


def _measure(steady: SteadyState, trial: Trial, predicted: int, times: Sequence[float]) -> Measured:
    steady.prepare(trial.budget, trial.candidate)
    candidate = steady.candidates[trial.candidate]
    return Measured(
        trial=trial,
        predicted_flops=predicted,
        counted_flops=count_step_flops(candidate.callable, candidate.batch),
        saved_bytes=saved_bytes(candidate.loss, candidate.model),
        seconds=tuple(times),
    )


def _time_first_steps(candidate: Candidate, sets: Sequence[Trained], device: torch.device) -> Spread:
    ratio = []
    for trained in sets:
        first = seconds(functools.partial(candidate.switch_and_step, trained), device)
        ordinary = statistics.median(seconds(candidate.step, device) for _ in range(ORDINARY_STEPS))
        ratio.append(first / ordinary)
    return spread(ratio)
