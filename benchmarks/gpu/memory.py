"""Bytes saved for backward, predicted and measured, and bytes of optimizer state."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch.optim import Optimizer

from benchmarks.gpu.candidates import EAGER, MAKERS, OURS
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.sheet import Sheet, against
from benchmarks.measurement import release_memory
from benchmarks.steady_state import step_memory
from gtcompile import train_only
from gtcompile.state.optimizer_state import FrozenState
from gtcompile.state.optimizer_state import Setting as FrozenSetting
from gtcompile.tools.bench.measurement import Spread, seconds
from gtcompile.tools.bench.steady_state import SteadyState

STATE = "optimizer state: "
"""Prefix of the units that move optimizer state."""
BUDGET = 0.5


def units(setting: Setting) -> list[str]:
    """Activations, and each way to treat the state of frozen parameters."""
    return [SHORT, *(STATE + kept for kept in get_args(FrozenSetting))]


def measure(setting: Setting, unit: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure bytes; yields everything so far after each budget."""
    if unit.startswith(STATE):
        yield _state(setting, unit.removeprefix(STATE))
    else:
        yield from _activations(setting, unit)


def _activations(setting: Setting, name: str) -> Iterator[dict[str, Any]]:
    subject, device = setting.subject(name), setting.workload(name).device
    candidates = {way: MAKERS[way](subject) for way in (OURS, EAGER)}
    steady = SteadyState(candidates, setting.selections(name))
    predicted, rows = setting.plan(name)["saved_bytes"], []
    for trial in steady.trials:
        steady.prepare(trial.budget, trial.candidate)
        memory = step_memory(candidates[trial.candidate], device)
        row = {"candidate": trial.candidate, "budget": trial.budget, **memory.as_dict()}
        rows.append(row | {"predicted_bytes": predicted[str(trial.budget)]})
        yield {"trials": rows}


def _state(setting: Setting, kept: str) -> dict[str, Any]:
    """Give every parameter moments, freeze half of the model, and train everything again."""
    workload = setting.workload(SHORT)
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    release_memory(workload.device)
    state = FrozenState(optimizer, kept)  # type: ignore[arg-type]
    train_only(model, setting.selections(SHORT)[BUDGET].trained)
    to_host = seconds(state.apply, workload.device)
    frozen = _bytes_on(optimizer, workload.device)
    train_only(model, None)
    back = seconds(state.apply, workload.device)
    everything = 2 * sum(p.nbytes for p in model.parameters())
    return {"all_bytes": everything, "frozen_bytes": frozen, "away_s": to_host, "back_s": back}


def _bytes_on(optimizer: Optimizer, device: torch.device) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.device.type == device.type)


def sheet(saved: Saved) -> Sheet:
    """One row per way and budget, then one per treatment of optimizer state."""
    results = saved.results
    trials = results.get(SHORT, {"trials": []})["trials"]
    rows = [
        (
            row["candidate"],
            f"{row['budget']:g}",
            _megabytes(row["predicted_bytes"]),
            _megabytes(row["saved_bytes"]),
            _megabytes(row["peak_bytes"]),
            "",
        )
        for row in trials
    ]
    for unit, found in results.items():
        if unit.startswith(STATE):
            on_device = f"{_megabytes(found['frozen_bytes'])} of {_megabytes(found['all_bytes'])}"
            times = f"{found['away_s']:.2f}, back {found['back_s']:.2f}"
            rows.append((f'{STATE}"{unit.removeprefix(STATE)}"', f"{BUDGET}", "", "", on_device, times))
    return Sheet(
        title=f"Memory in MB, without weights ({SHORT})",
        columns=("", "budget", "saved, predicted", "saved", "peak, or state on the device", "s to move"),
        rows=rows,
        verdicts=list(_verdicts(trials)),
    )


def _verdicts(trials: list[Mapping[str, Any]]) -> Iterator[str]:
    peaks = {(row["candidate"], row["budget"]): row["peak_bytes"] for row in trials}
    for (way, budget), peak in peaks.items():
        if way == OURS and (EAGER, budget) in peaks:
            share = peak / peaks[EAGER, budget]
            yield against(f"budget {budget:g}: peak over eager's", Spread(share, share, share), 1.0)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"
