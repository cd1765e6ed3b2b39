"""What the stages have in common: the device, the workloads, and what earlier stages found."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.records import results_of
from benchmarks.workloads import Workload, llama_shape, opt_shape, qwen3_shape, wide_llama_shape
from gtcompile.selection.selection import Selection
from gtcompile.tools.bench.subject import ModelSubject

_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": {"shape": wide_llama_shape, "layers": 16, "hidden": 2048, "vocabulary": 128256},
    "llama-3b": {"shape": llama_shape, "layers": 28, "hidden": 3072, "vocabulary": 128256},
    "opt-2.7b": {"shape": opt_shape, "layers": 32, "hidden": 2560, "vocabulary": 50272},
    "qwen3-0.6b": {"shape": qwen3_shape, "layers": 28, "hidden": 1024, "vocabulary": 151936},
}
_SMALL, _LARGE = {"rows": 4, "length": 512}, {"rows": 8, "length": 1024}
_TINY = {"layers": 2, "hidden": 64, "vocabulary": 64, "rows": 2, "length": 8}
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    f"{name}, {size['rows']} x {size['length']}": {**_SHAPES[name], **size}
    for name, size in (
        ("llama-1b", _LARGE),
        ("llama-1b", _SMALL),
        ("llama-3b", _SMALL),
        ("opt-2.7b", _SMALL),
        ("qwen3-0.6b", _SMALL),
        ("llama-3b", _LARGE),
        ("opt-2.7b", _LARGE),
        ("qwen3-0.6b", _LARGE),
    )
}
"""Fields of `Workload` by name, most telling first."""
MAIN, SHORT = list(WORKLOADS)[:2]
"""The workload of the stages that measure only one: with much work a step, and with little."""
BUDGETS = (0.7, 0.5, 0.4)
"""Shares of a full step's FLOPs; everything trained is measured too."""
BELOW_ONE_BILLION = ("qwen3",)
"""Workloads too small for the targets, which are for a billion parameters and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured, and where results are kept."""

    output: Path
    """Folder of the results, one file per stage."""
    device: str
    """torch's name of the device."""
    tiny: bool = False
    """Whether sizes are those of a test."""
    pretrained: str = "demo"
    """The model that the quality stage trains: `demo`, `smollm2`, a hub id or a directory."""
    data_dir: Path | None = None
    """Folder of SciTLDR for that model; None for generated texts."""

    def log_output(self) -> None:
        """Let everything that this process prints go to a log in the folder."""
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, activations and moments."""
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32

    @property
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads, most telling first."""
        return (MAIN, SHORT) if self.tiny else tuple(WORKLOADS)

    def workload(self, name: str) -> Workload:
        """A workload by name; in a test with its shape and the smallest sizes."""
        fields = {**WORKLOADS[name], **(_TINY if self.tiny else {})}
        return Workload(**fields, device=torch.device(self.device), dtype=self.dtype)

    def subject(self, name: str) -> ModelSubject:
        """A workload whose models share the memory of their weights."""
        workload = self.workload(name)
        return ModelSubject(name=name, original=workload.model(), example=workload.batch(), shape=name)

    def block(self, name: str) -> Workload:
        """A workload of two blocks and next to no vocabulary: its blocks compile to the same code."""
        return replace(self.workload(name), layers=2, vocabulary=64)

    def selections(self, name: str) -> dict[float, Selection]:
        """The selections that the first stage made for a workload, by budget."""
        saved = self.plan(name)["selections"]
        return {float(budget): _selection(chosen) for budget, chosen in saved.items()}

    def plan(self, name: str) -> Mapping[str, Any]:
        """What the first stage found for a workload.

        Raises:
            ValueError: that stage has no result for it.
        """
        found: Mapping[str, Any] | None = results_of(self.output, "plans").get(name)
        if found is None:
            raise ValueError(f"the stage plans has no result for {name}; run it again")
        return found


def _selection(saved: Mapping[str, Any]) -> Selection:
    return Selection(**{**saved, "trained": frozenset(saved["trained"])})


def peak_flops(card: str) -> float | None:
    """Dense bf16 FLOPs per second by the maker's data sheet; None for a card that is not listed."""
    return next((flops for name, flops in _PEAKS.items() if name in card), None)


_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
