"""An inspection as the plain, compact values that the HTML report draws."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from gtcompile.costs.dependency_graph import FORWARD, dependencies
from gtcompile.costs.explain import saved_bytes
from gtcompile.graph.module_paths import block_of
from gtcompile.tools.inspect.graph_exports import shape_of
from gtcompile.tools.inspect.inspection import Inspection

Numbers = defaultdict[str, int]


def report_data(inspection: Inspection) -> dict[str, Any]:
    """Everything the report shows; names are written once and referred to by number.

    A parameter is `[fqn, aliases, shape, elements, dW FLOPs, status, block]`; a node
    `[name, operator, module, block, phase, FLOPs, shape, inputs, parameter whose gradient it is or -1]`,
    where the phase is 0 for inputs, 1 for the forward and 2 for the backward.
    """
    parameters = inspection.costs.parameters
    own, number = inspection.own_flops(), {p.fqn: i for i, p in enumerate(parameters)}
    operators, modules, blocks = _numbering(), _numbering(), _numbering()
    rows = inspection.rows()
    return {
        "model": inspection.model,
        "architecture": inspection.architecture,
        "batch": _batch_in_words(inspection),
        "origin": inspection.importance_origin,
        "totals": inspection.totals(),
        "parameters": [
            [
                r["parameter"],
                r["aliases"],
                r["shape"],
                r["elements"],
                own.get(r["parameter"], 0),
                r["status"],
                blocks[r["block"]],
            ]
            for r in rows
        ],
        "plans": _plans(inspection, number),
        "nodes": _nodes(inspection, number, operators, modules, blocks),
        "operators": list(operators),
        "modules": list(modules),
        "blocks": list(blocks),
        "run": _run(inspection),
    }


def _numbering() -> Numbers:
    """Number names in the order of their first use."""
    return defaultdict(itertools.count().__next__)


def _nodes(
    inspection: Inspection,
    number: Mapping[str, int],
    operators: Numbers,
    modules: Numbers,
    blocks: Numbers,
) -> list[list[Any]]:
    joint = inspection.joint
    known = dependencies(joint).nodes
    slots = zip(joint.slots, joint.gradients, strict=True)
    gradients = {node: number[slot] for slot, node in slots if node and slot and slot in number}
    index = {node: i for i, node in enumerate(joint.module.graph.nodes) if node.op != "output"}
    return [
        [
            node.name,
            operators[known[node.name]["operator"]],
            modules[known[node.name]["module"]],
            blocks[block_of(known[node.name]["module"])],
            0 if node.op == "placeholder" else 1 if known[node.name]["direction"] == FORWARD else 2,
            known[node.name]["flops"],
            shape_of(node),
            [index[source] for source in node.all_input_nodes],
            gradients.get(node, -1),
        ]
        for node in index
    ]


def _batch_in_words(inspection: Inspection) -> str:
    """The batch in words, and which branch the forward takes if it branches on data."""
    way = f"; the forward branches on data, and the branch it takes with {inspection.values} is shown"
    return inspection.batch + (way if inspection.values else "")


def _plans(inspection: Inspection, number: Mapping[str, int]) -> list[dict[str, Any]]:
    """One plan per selection of a run, or the one plan of an inspection."""
    chosen = inspection.selection
    if inspection.run is None:
        plan = {
            "trained": chosen.trained,
            "step_flops": chosen.step_flops,
            "budget_flops": chosen.budget_flops,
            "importance": inspection.importance,
            "importance_bound": chosen.importance_bound,
        }
        return [{**_plan(inspection, plan, number), "label": "plan"}]
    return [
        {**_plan(inspection, plan, number), **_measured(inspection.run.metrics, plan, later)}
        for plan, later in zip(inspection.run.selections, [*inspection.run.selections[1:], None], strict=True)
    ]


def _plan(inspection: Inspection, plan: Mapping[str, Any], number: Mapping[str, int]) -> dict[str, Any]:
    importance = plan["importance"]
    return {
        "trained": sorted(number[fqn] for fqn in plan["trained"]),
        "step_flops": plan["step_flops"],
        "budget_flops": plan["budget_flops"],
        "counted": plan.get("counted_step_flops"),
        "saved": saved_bytes(inspection.joint, frozenset(plan["trained"])),
        "saved_measured": plan.get("saved_bytes"),
        "peak": plan.get("peak_bytes"),
        "importance": {number[fqn]: float(f"{value:.4g}") for fqn, value in importance.items()},
        "bound": plan["importance_bound"],
    }


def _measured(
    metrics: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], later: Mapping[str, Any] | None
) -> dict[str, Any]:
    epoch, end = plan["epoch"], None if later is None else later["epoch"]
    steps = [m for m in metrics if m["epoch"] >= epoch and (end is None or m["epoch"] < end)]
    return {
        "label": f"epoch {epoch + 1}",
        "steps": len(steps),
        "seconds": median(m["seconds"] for m in steps) if steps else None,
        "loss": sum(m["loss"] for m in steps) / len(steps) if steps else None,
    }


def _run(inspection: Inspection) -> dict[str, Any] | None:
    if inspection.run is None:
        return None
    losses = [m["loss"] for m in inspection.run.metrics]
    stride = max(1, len(losses) // 400)
    means = [sum(losses[i : i + stride]) / len(losses[i : i + stride]) for i in range(0, len(losses), stride)]
    return {
        "settings": {k: v for k, v in inspection.run.settings.items() if k not in ("batch", "format")},
        "summary": inspection.run.summary,
        "losses": [round(loss, 4) for loss in means],
        "stride": stride,
    }
