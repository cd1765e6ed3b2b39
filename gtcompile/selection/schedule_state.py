"""A schedule in the middle of its window as JSON types, and back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from gtcompile.costs.backward_costs import BackwardCosts, SharedWork
from gtcompile.graph.joint_graph import Parameter
from gtcompile.selection.schedule import Plan, Progress, Schedule


def schedule_state(schedule: Schedule, fqns: Sequence[str]) -> dict[str, Any]:
    """Convert a schedule to JSON types.

    Sets are written as hexadecimal numbers, bit i for parameter i: names would take a hundred times the
    space.

    Args:
        schedule: what to write.
        fqns: every parameter of the model, sorted.
    """
    plan, costs, progress = schedule.plan, schedule.costs, schedule.progress
    return {
        "seed": schedule.seed,
        "number": schedule.number,
        "budget_fraction": schedule.budget_fraction,
        "whole_flops": schedule.whole_flops,
        "sets": [_pack(each, fqns) for each in plan.sets],
        "shallow": _pack(plan.shallow, fqns),
        "at_random": plan.at_random,
        "lasts": list(plan.lasts),
        "kept_blocks": plan.kept_blocks,
        "saved_flops": plan.saved_flops,
        "progress": {
            **asdict(progress),
            "waiting": None if progress.waiting is None else _pack(progress.waiting, fqns),
        },
        "selectable": _pack(costs.fqns, fqns),
        "forward_flops": costs.forward_flops,
        "shared_work": [[work.flops, _pack(work.parameters, fqns)] for work in costs.shared_work],
        "follows_values": costs.follows_values,
    }


def schedule_from(
    state: Mapping[str, Any],
    parameters: Sequence[Parameter],
    propose: Callable[[BackwardCosts, torch.Generator], frozenset[str]] | None = None,
) -> Schedule:
    """Restore the schedule that `schedule_state` wrote.

    Args:
        state: as `schedule_state` returned it.
        parameters: of the same model.
        propose: as for `Schedule`.
    """
    fqns = sorted(p.fqn for p in parameters)
    progress, selectable = state["progress"], _unpack(state["selectable"], fqns)
    waiting = None if progress["waiting"] is None else _unpack(progress["waiting"], fqns)
    costs = BackwardCosts(
        parameters=tuple(
            replace(p, status="selectable" if p.fqn in selectable else "frozen by user") for p in parameters
        ),
        forward_flops=state["forward_flops"],
        shared_work=tuple(SharedWork(flops, _unpack(mask, fqns)) for flops, mask in state["shared_work"]),
        follows_values=state["follows_values"],
    )
    return Schedule(
        Plan(
            sets=tuple(_unpack(each, fqns) for each in state["sets"]),
            shallow=_unpack(state["shallow"], fqns),
            at_random=state["at_random"],
            lasts=tuple(state["lasts"]),
            kept_blocks=state.get("kept_blocks"),
            saved_flops=state.get("saved_flops", 0),
        ),
        costs,
        state["budget_fraction"],
        seed=state["seed"],
        number=state["number"],
        propose=propose,
        progress=Progress(**{**progress, "waiting": waiting}),
        whole_flops=state["whole_flops"],
    )


def _pack(chosen: Collection[str], fqns: Sequence[str]) -> str:
    return hex(sum(1 << index for index, fqn in enumerate(fqns) if fqn in chosen))


def _unpack(mask: str, fqns: Sequence[str]) -> frozenset[str]:
    bits = int(mask, 16)
    return frozenset(fqn for index, fqn in enumerate(fqns) if bits >> index & 1)
