"""Tiny random language models of many architectures, from a file of configuration values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = Path(__file__).parent / "zoo_data" / "architectures.json"
"""Language models of transformers 5.23, with the values that make them tiny."""
ROWS, LENGTH = 2, 16
FIRST_ID, LAST_ID = 3, 99
"""Of the tokens in a batch; below are padding and the ends of a sequence."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class of transformers and a configuration that makes it tiny."""

    name: str
    """Of the model class."""
    family: str
    """transformers' `model_type`."""
    config_class: str
    values: Mapping[str, Any]
    """Of the configuration."""

    def build(self) -> PreTrainedModel:
        """The model with random weights, the same every time, in training mode, without dropout."""
        config = getattr(transformers, self.config_class)(**self.values)
        disable_dropout(config)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, self.name)(config)
        model.train()
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        """Random tokens; the labels are the same tokens."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(FIRST_ID, LAST_ID + 1, (ROWS, LENGTH), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


def disable_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability of a configuration, and of those inside it, to zero."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif isinstance(value, PretrainedConfig):
            disable_dropout(value)


def read_architectures(path: Path = ARCHITECTURES) -> dict[str, Architecture]:
    """The architectures of a file, by the name of the model class.

    Args:
        path: a JSON object from names to `{"model_type", "config_class", "config"}`.
    """
    entries = json.loads(path.read_text())
    return {
        name: Architecture(name, entry["model_type"], entry["config_class"], entry["config"])
        for name, entry in entries.items()
    }
