"""An inspection: costs, trained set and importances of a model, and the rows that are shown of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gtcompile.costs.backward_costs import BackwardCosts
from gtcompile.costs.budgets import written_budget
from gtcompile.costs.explain import saved_bytes
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.graph.module_paths import block_of_parameter
from gtcompile.selection.selection import Selection
from gtcompile.tools.runs.run_record import RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The costs of a step, and the set that a budget would train or a run trained."""

    model: str
    """The model's name on the command line."""
    architecture: str
    """Class of the model."""
    batch: str
    """The batch shape in words; all FLOPs are for this shape."""
    joint: JointGraph
    """The joint graph as captured, every gradient live."""
    costs: BackwardCosts
    """The costs of any trained set."""
    importance: Mapping[str, float]
    """Importances by FQN."""
    importance_origin: str
    """Origin of the importances in words."""
    selection: Selection
    """The best selection for these importances, or the last one of a run."""
    run: RunRecord | None = None
    """The inspected run, if it is one."""
    values: str | None = None
    """The values that decided which branch the forward took; None if it does not branch on data."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per parameter, in registration order.

        `dw_flops` is what only this parameter's gradient needs. `marginal_flops` is what a step loses without
        it where it is trained, and would gain with it where it is frozen.
        """
        own = self.own_flops()
        return [
            {
                "parameter": p.fqn,
                "block": block_of_parameter(p.fqn),
                "aliases": list(p.aliases),
                "shape": list(p.shape),
                "elements": p.numel,
                "dw_flops": own.get(p.fqn, 0),
                "marginal_flops": self._marginal(p.fqn),
                "importance": self.importance.get(p.fqn),
                "status": self._status(p.fqn, p.status),
            }
            for p in self.costs.parameters
        ]

    def own_flops(self) -> dict[str, int]:
        """FLOPs that only one parameter's gradient needs, by FQN; parameters without any are absent."""
        return {next(iter(w.parameters)): w.flops for w in self.costs.shared_work if len(w.parameters) == 1}

    def _marginal(self, fqn: str) -> int:
        if fqn not in self.costs.fqns:
            return 0
        return self.costs.marginal_flops(fqn, self.selection.trained - {fqn})

    def _status(self, fqn: str, status: str) -> str:
        if status != "selectable":
            return status
        return "trained" if fqn in self.selection.trained else "frozen"

    def blocks(self) -> list[dict[str, Any]]:
        """One row per block, in registration order: all of it, and the trained part."""
        blocks: dict[str, dict[str, Any]] = {}
        for row in self.rows():
            keys = ("parameters", "trained", "elements", "trained_elements", "dw_flops", "trained_dw_flops")
            block = blocks.setdefault(row["block"], {"block": row["block"], **dict.fromkeys(keys, 0)})
            trained = row["status"] == "trained"
            for key, value in (
                ("parameters", 1),
                ("elements", row["elements"]),
                ("dw_flops", row["dw_flops"]),
            ):
                block[key] += value
                block["trained" if key == "parameters" else f"trained_{key}"] += value * trained
        return list(blocks.values())

    def totals(self) -> dict[str, Any]:
        """FLOPs of one step and of the budget, bytes saved for backward, importance and its bound."""
        backward = self.costs.full_flops - self.costs.forward_flops
        dw = sum(self.own_flops().values())
        return {
            "forward_flops": self.costs.forward_flops,
            "dx_flops": backward - dw,
            "dw_flops": dw,
            "full_flops": self.costs.full_flops,
            "budget_flops": self.selection.budget_flops,
            "step_flops": self.selection.step_flops,
            "minimum_budget_fraction": self.costs.minimum_budget_fraction,
            "full_saved_bytes": saved_bytes(self.joint, self.joint.live),
            "step_saved_bytes": saved_bytes(self.joint, self.selection.trained),
            "importance": self.selection.importance,
            "importance_bound": self.selection.importance_bound,
        }

    def as_dict(self) -> dict[str, Any]:
        """The inspection as plain values, for `--json`."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "batch": self.batch,
            "values": self.values,
            "importance_origin": self.importance_origin,
            **self.totals(),
            "blocks": self.blocks(),
            "parameters": self.rows(),
        }

    def lines(self) -> list[str]:
        """An explanation of the figures, one sentence per line."""
        least = self.costs.full_flops, self.costs.cheapest_step_flops
        way = f"the forward branches on data; all figures are for the branch it takes with {self.values}"
        return [
            *([way] if self.values else []),
            f"FLOPs of one training step on batches of {self.batch}, 2 per multiply-add",
            f"smallest budget that trains anything: {written_budget(*least)}",
            f"importance: {self.importance_origin}",
            "dW FLOPs: work that only this gradient needs; marginal: FLOPs that training it adds to a step",
        ]
