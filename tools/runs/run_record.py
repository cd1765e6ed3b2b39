"""A run read from its folder, without training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtcompile.tools.common.files import read_lines
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.runs.preparation import with_adapters
from gtcompile.tools.runs.settings import RECORDED, settings_from

FORMAT = 1
"""Version of `run.json`; another number means another layout of the folder."""
NEEDED = {
    "importance",
    "importance_bound",
    "epoch",
    "trained",
    "selectable",
    "step_flops",
    "budget_flops",
    "full_flops",
}
"""Keys that every selection of a run has; counts and measurements may be there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its folder describes it, finished or not."""

    path: Path
    """The folder."""
    settings: Mapping[str, Any]
    """The content of `run.json`."""
    selections: Sequence[Mapping[str, Any]]
    """The content of `selections.json`, at least one: each is in force from its epoch on."""
    metrics: Sequence[Mapping[str, Any]]
    """One record per step taken."""
    summary: Mapping[str, Any] | None
    """The result; None until the run is finished."""

    @property
    def model(self) -> str:
        """The trained model's folder, or the name of the original one: of adapters, or if none is saved."""
        own = self.path / "model"
        return str(own) if (own / "config.json").is_file() else str(self.settings["model"])

    def adapted(self, model: nn.Module) -> nn.Module:
        """Add the run's adapters, as they were trained if they are saved; without adapters, change nothing.

        Args:
            model: that `model` names.
        """
        if self.settings.get("lora") is None:
            return model
        values = {name: value for name, value in self.settings.items() if name not in RECORDED}
        adapted: Any = with_adapters(model, settings_from(values))
        own = self.path / "model"
        if adapted.device.type != "meta" and (own / "adapter_config.json").is_file():
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(adapted, load_peft_weights(str(own)))
        return adapted  # type: ignore[no-any-return]

    @property
    def shape(self) -> str:
        """The shape of every batch, in words."""
        return str(self.settings["batch_shape"])

    def batch(self) -> dict[str, torch.Tensor]:
        """A batch of ones in the shape of the run's."""
        described = self.settings["batch"].items()
        return {key: torch.ones(v["shape"], dtype=getattr(torch, v["dtype"])) for key, v in described}

    @property
    def batch_shape(self) -> BatchShape:
        """The shape of every batch."""
        tensors = self.settings["batch"]
        (rows, length), (_, columns) = tensors["input_ids"]["shape"], tensors["labels"]["shape"]
        return BatchShape(batch_size=rows, length=length, target_length=columns)

    def selection_at(self, epoch: int) -> Mapping[str, Any]:
        """The selection in force in an epoch.

        Args:
            epoch: from 1, as `finetune` prints it.

        Raises:
            ValueError: the run has no such epoch.
        """
        last = max(int(self.settings["epochs"]), 1)
        if not 1 <= epoch <= last:
            raise ValueError(f"the run in {self.path} has epochs 1 to {last}, not {epoch}")
        return [s for s in self.selections if s["epoch"] < epoch][-1]


def described_batch(batch: Mapping[str, torch.Tensor], shape: str) -> dict[str, Any]:
    """The description of a run's batches that `run.json` holds in addition to the settings."""
    tensors = {
        key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for key, tensor in batch.items()
    }
    return {"format": FORMAT, "batch_shape": shape, "batch": tensors}


def read_run(path: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: a file is missing or broken, or the run was written by another version of gtcompile.
    """
    settings = _read(path / "run.json")
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        said = "no format" if found is None else f"format {found!r}"
        raise ValueError(
            f"{path / 'run.json'} has {said}, this gtcompile reads format {FORMAT}: the run was written by "
            f"another version. Inspect {path / 'model'} instead, "
            f"with --importances {path / 'selections.json'}"
        )
    selections = _read(path / "selections.json")
    if not isinstance(selections, list) or not all(
        isinstance(s, dict) and s.keys() >= NEEDED for s in selections
    ):
        raise ValueError(
            f"{path / 'selections.json'} cannot be read as part of a run: expected a list of selections with "
            f"{', '.join(sorted(NEEDED))}"
        )
    if not selections:
        raise ValueError(f"the run in {path} has selected nothing yet")
    summary = path / "summary.json"
    return RunRecord(
        path=path,
        settings=settings,
        selections=selections,
        metrics=read_lines(path / "metrics.jsonl"),
        summary=_read(summary) if summary.is_file() else None,
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as part of a run: {error}") from error
