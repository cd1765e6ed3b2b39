"""Tiny random models of many architectures, from a file of configuration values and batches."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = Path(__file__).parent / "architectures.json"
"""Language models of transformers 5.23, with the values that make them tiny."""
FURTHER = ARCHITECTURES.with_name("further.json")
"""Models of other kinds, for text, images, sound and several of them, with values and inputs."""
TOKEN_IDS = {"shape": [2, 16], "integers": [3, 99]}
"""Ids below 3 are padding and the ends of a sequence."""
TOKENS = {"input_ids": TOKEN_IDS, "labels": TOKEN_IDS}
"""The default inputs: random tokens, also used as labels."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class of transformers and a configuration that makes it tiny."""

    name: str
    """Name of the model class."""
    family: str
    """transformers' `model_type`."""
    config_class: str
    values: Mapping[str, Any]
    """Values of the configuration."""
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=lambda: TOKENS)
    """Descriptions of the model's inputs for `example_input`, by name."""
    with_dropout: bool = False
    """Whether dropout stays as the values say."""

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model with random weights, the same every time, in training mode."""
        config = getattr(transformers, self.config_class)(**self.values)
        if not self.with_dropout:
            disable_dropout(config)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        torch.manual_seed(0)
        model: Any = getattr(transformers, self.name)(config)
        trained: PreTrainedModel = model.to(dtype).train()
        return trained

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The model's inputs, the same every time."""
        inputs = {name: example_input(description) for name, description in self.inputs.items()}
        floats = {
            name: value.to(dtype)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return inputs | floats


def example_input(description: Any) -> Any:
    """An input of a model.

    Args:
        description: `{"shape", "integers": [first, last]}` for random integers, always the same ones;
            `{"shape"}`, with `"normal": [mean, deviation]` where not 0 and 1, for normal values; a list for
            a tensor of its values; anything else for itself.
    """
    if isinstance(description, list):
        return torch.tensor(description)
    if not isinstance(description, Mapping):
        return description
    generator = torch.Generator().manual_seed(0)
    if "integers" in description:
        first, last = description["integers"]
        return torch.randint(first, last + 1, description["shape"], generator=generator)
    mean, deviation = description.get("normal", (0.0, 1.0))
    return mean + deviation * torch.randn(description["shape"], generator=generator)


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
        path: a JSON object from names to `{"model_type", "config_class", "config"}`, and `"inputs"` where
            they are not tokens.
    """
    entries = json.loads(path.read_text())
    return {
        name: Architecture(
            name, entry["model_type"], entry["config_class"], entry["config"], entry.get("inputs", TOKENS)
        )
        for name, entry in entries.items()
    }
