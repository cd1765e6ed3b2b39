"""Whether compiling for one trained set pays: steps of specialized variants beside hoisted ones.

Run it with `python -m benchmarks.variants`. It is what decides that gtcompile compiles no
specialized variants beside the training. On a CPU it quotes ratios only.
"""

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.models import build_on_meta
from benchmarks.steady_state import flops_share
from benchmarks.switching import BUDGETS, make_workload
from benchmarks.workloads import Workload, hoisted_blocks
from gtcompile.compiler.blocks import compile_blocks
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.selection.selection import select_parameters
from gtcompile.state.trained_set import train_only
from gtcompile.tools.bench.baselines import Candidate, compilations
from gtcompile.tools.bench.measurement import Spread, alternate, describe_machine, ratios, seconds
from gtcompile.tools.bench.steady_state import HOISTED, SteadyState, Trial
from gtcompile.tools.common.known_importances import draw_importance
from gtcompile.tools.common.step_memory import saved_bytes

SPECIALIZED = "specialized blocks"
PLENTY_KEPT = 256
"""Variants a region keeps, so that no set is compiled twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both variants with one trained set."""

    budget: float
    """Share of a full step's FLOPs asked for; 1.0 trains everything."""
    flops: float
    """Share of a full step's FLOPs that the set takes."""
    time: Spread
    """Step time, specialized over hoisted, round by round."""
    won: float
    """Share of the rounds in which specialized was faster."""
    saved: float
    """Bytes saved for backward, specialized over hoisted."""
    compiled: int
    """Graphs that the specialized variants of this set needed."""
    steps_to_pay: float
    """Hoisted steps that the first specialized one takes, over the share of a step it wins; or infinite."""


def specialized_blocks(workload: Workload) -> Candidate:
    """Blocks that are compiled anew for each trained set."""
    prepare = functools.partial(compile_blocks, variants="specialized", variants_kept=PLENTY_KEPT)
    return Candidate(workload, prepare, train_only)


def compare_variants(
    workload: Workload, budgets: Sequence[float], rounds: int, seed: int
) -> list[Comparison]:
    """Time steps of both, in turns.

    Args:
        workload: what to train.
        budgets: shares of a full step's FLOPs, in (0, 1); everything trained is measured as well.
        rounds: in which each is timed once with each set.
        seed: of the importances the sets are best for.
    """
    batch = {name: torch.zeros_like(value, device="cpu") for name, value in workload.batch().items()}
    costs = backward_costs(build_on_meta(workload.config()), batch)
    importance = draw_importance(costs, seed)
    selections = {budget: select_parameters(costs, importance, budget) for budget in budgets}
    candidates = {HOISTED: hoisted_blocks(workload), SPECIALIZED: specialized_blocks(workload)}
    steady = SteadyState(candidates, selections)
    both = [Trial(candidate, budget) for budget in (1.0, *budgets) for candidate in candidates]
    compiled, waited = {}, {}
    for trial in both:
        before = compilations()
        waited[trial] = seconds(
            functools.partial(steady.prepare, trial.budget, trial.candidate), workload.device
        )
        compiled[trial] = (compilations() - before).compiled
    contenders = {trial: steady.timed(trial) for trial in both}
    times = alternate(contenders, rounds, workload.device)
    return [
        _compare(steady, budget, times, compiled[Trial(SPECIALIZED, budget)], waited)
        for budget in (1.0, *budgets)
    ]


def _compare(
    steady: SteadyState,
    budget: float,
    times: Mapping[Trial, Sequence[float]],
    compiled: int,
    waited: Mapping[Trial, float],
) -> Comparison:
    specialized, hoisted = Trial(SPECIALIZED, budget), Trial(HOISTED, budget)
    saved = {}
    for trial in (specialized, hoisted):
        steady.prepare(trial.budget, trial.candidate)
        candidate = steady.candidates[trial.candidate]
        saved[trial] = saved_bytes(candidate.loss, candidate.model)
    pairs = list(zip(times[specialized], times[hoisted], strict=True))
    time = ratios(times[specialized], times[hoisted])
    step = sorted(times[hoisted])[len(pairs) // 2]
    won = 1 - time.median
    return Comparison(
        budget=budget,
        flops=flops_share(steady, hoisted),
        time=time,
        won=sum(one < other for one, other in pairs) / len(pairs),
        saved=saved[specialized] / saved[hoisted],
        compiled=compiled,
        steps_to_pay=waited[specialized] / step / won if won > 0 else float("inf"),
    )


def variants_table(comparisons: Sequence[Comparison]) -> Table:
    """One row per budget."""
    table = Table(title="Specialized over hoisted: median (least-greatest) over the rounds")
    for column in ("budget", "FLOPs", "step time", "won", "saved", "graphs", "pays after"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in comparisons:
        numbers = (f"{c.budget:.2f}", f"{c.flops:.3f}", str(c.time), f"{c.won:.0%}", f"{c.saved:.3f}")
        table.add_row(*numbers, str(c.compiled), f"{c.steps_to_pay:.0f}")
    return table


def main(
    workload: Annotated[list[str] | None, typer.Option(help="default: opt, then llama")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="in which each is timed once")] = 9,
    seed: Annotated[int, typer.Option(help="of the importances")] = 0,
    layers: Annotated[int | None, typer.Option(min=2)] = None,
    hidden: Annotated[int | None, typer.Option(min=64, help="a multiple of 64")] = None,
) -> None:
    """Time specialized variants beside hoisted ones at several budgets."""
    console = Console()
    try:
        chosen = [make_workload(name, torch.device(device), None) for name in workload or ("opt", "llama")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(describe_machine(torch.device(device)), highlight=False)
    for each in chosen:
        sized = replace(each, layers=layers or each.layers, hidden=hidden or each.hidden)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nobody profits from earlier runs
            comparisons = compare_variants(sized, BUDGETS, rounds, seed)
        torch.compiler.reset()
        console.print(str(sized), variants_table(comparisons), sep="\n", highlight=False)


if __name__ == "__main__":
    typer.run(main)
