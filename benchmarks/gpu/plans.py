"""What later stages need: the selections of every workload, and compiled blocks in Inductor's cache."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.candidates import COMPILED, GENERATED, MAKERS, ways_of
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import BUDGETS, Setting
from benchmarks.gpu.sheet import Sheet
from benchmarks.steady_state import joint_of
from gtcompile import BackwardCosts, BudgetError, select_parameters
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.explain import saved_bytes
from gtcompile.selection.selection import Selection
from gtcompile.tools.bench.measurement import seconds
from gtcompile.tools.common.known_importances import draw_importance

CODE = "code of "
"""Prefix of the units that compile a workload's blocks."""
SEED = 0
"""Seed of the random importances."""


def units(setting: Setting) -> list[str]:
    """Every workload's selections, and every workload's compiled blocks."""
    return [*setting.workloads, *(CODE + name for name in setting.workloads)]


def measure(setting: Setting, unit: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Plan or compile for one workload."""
    if unit.startswith(CODE):
        yield from _compile(setting, unit.removeprefix(CODE))
    else:
        yield _plan(setting, unit)


def _plan(setting: Setting, name: str) -> dict[str, Any]:
    """Select for every budget on the joint graph of the device, which needs no weights."""
    workload = setting.workload(name)
    start = time.perf_counter()
    joint = joint_of(workload)
    costs = costs_of(joint)
    captured = time.perf_counter()
    selections = _select(costs)
    selected = time.perf_counter()
    predicted = {1.0: joint.live, **{budget: chosen.trained for budget, chosen in selections.items()}}
    return {
        "full_flops": costs.full_flops,
        "forward_flops": costs.forward_flops,
        "minimum_budget": costs.minimum_budget_fraction,
        "parameters": sum(p.numel for p in costs.parameters),
        "capture_s": captured - start,
        "selection_s": (selected - captured) / max(len(selections), 1),
        "selections": {str(budget): _plain(chosen) for budget, chosen in selections.items()},
        "saved_bytes": {str(budget): saved_bytes(joint, fqns) for budget, fqns in predicted.items()},
    }


def _select(costs: BackwardCosts) -> dict[float, Selection]:
    """The selections of all budgets that train anything."""
    importance, found = draw_importance(costs, SEED), {}
    for budget in BUDGETS:
        try:
            found[budget] = select_parameters(costs, importance, budget)
        except BudgetError:
            break  # smaller ones train nothing either
    return found


def _plain(selection: Selection) -> dict[str, Any]:
    return {**dataclasses.asdict(selection), "trained": sorted(selection.trained)}


def _compile(setting: Setting, name: str) -> Iterator[dict[str, Any]]:
    """Take the first step of two blocks in every way that compiles."""
    workload, taken = setting.block(name), {}
    for way in (way for way in ways_of(name) if way in (*COMPILED, GENERATED)):
        taken[way] = seconds(MAKERS[way](workload).step, workload.device)
        yield {"first_step_s": taken}


def sheet(saved: Saved) -> Sheet:
    """One row per workload."""
    results = saved.results
    columns = ("workload", "parameters", "TFLOP a full step", "least budget", "budgets", "capture s")
    plans = {name: plan for name, plan in results.items() if not name.startswith(CODE)}
    rows = [
        (
            name,
            f"{plan['parameters'] / 1e9:.2f} B",
            f"{plan['full_flops'] / 1e12:.2f}",
            f"{plan['minimum_budget']:.3f}",
            ", ".join(f"{float(budget):g}" for budget in plan["selections"]),
            f"{plan['capture_s']:.1f}",
        )
        for name, plan in plans.items()
    ]
    return Sheet(title="Plans: selections for random importances", columns=columns, rows=rows)
