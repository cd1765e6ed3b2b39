"""The methods that are compared. This module imports no torch, so that their names can be checked at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import nn

_LORA_RANK = 16
Prepare: TypeAlias = "Callable[[nn.Module], nn.Module]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method of fine-tuning."""

    prepare: Prepare
    """Changes the model before training: adds adapters, freezes parameters."""
    policy: str
    """What is trained at every step, by its name in `gtcompile.policies`."""
    budgeted: bool
    """Whether the method has a budget; if not, it trains everything that `prepare` left trainable."""
    learning_rate: float
    """The best known rate. A search also tries half and twice this rate."""


def unchanged(model: "nn.Module") -> "nn.Module":
    """The model as it is."""
    return model


def with_lora(model: "nn.Module") -> "nn.Module":
    """Add low-rank adapters to all linear layers except the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def biases_and_norms(model: "nn.Module") -> "nn.Module":
    """BitFit: train only biases. Scales of norms count as biases, since Llama has none."""
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return model


def _policy(name: str, learning_rate: float = 2e-4, prepare: Prepare = unchanged) -> Arm:
    return Arm(prepare=prepare, policy=name, budgeted=True, learning_rate=learning_rate)


def _whole(prepare: Prepare, learning_rate: float) -> Arm:
    return Arm(prepare=prepare, policy="last_layers", budgeted=False, learning_rate=learning_rate)


ARMS: Mapping[str, Arm] = {
    "full": _whole(unchanged, 1e-4),
    "occasionally_full": _policy("occasionally_full"),
    "best": _policy("best"),
    "last_layers": _policy("last_layers"),
    "lora": _whole(with_lora, 5e-4),
    "sampled": _policy("sampled"),
    "lora_occasionally_full": _policy("occasionally_full", 5e-4, with_lora),
    "rotating": _policy("rotating"),
    "lisa": _policy("lisa"),
    "random": _policy("random"),
    "paper": _policy("paper"),
    "bitfit": _whole(biases_and_norms, 2e-3),
}
"""Methods by name, in the order in which they are run."""
