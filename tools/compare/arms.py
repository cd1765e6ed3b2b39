"""The methods that are compared. This module imports no torch, so that their names can be checked at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

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
    labelled: bool = False
    """Whether logits are computed at labelled positions alone, see `only_labelled_logits`."""
    cached: bool = False
    """Whether the frozen prefix is computed once per text, see `PrefixCache`."""


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


def _whole(learning_rate: float, prepare: Prepare = unchanged) -> Arm:
    return Arm(prepare=prepare, policy="last_layers", budgeted=False, learning_rate=learning_rate)


def _policy(name: str) -> Arm:
    return Arm(prepare=unchanged, policy=name, budgeted=True, learning_rate=2e-4)


def _saving(policy: Arm, **changes: Any) -> Arm:
    return replace(policy, labelled=True, **changes)


ARMS: Mapping[str, Arm] = {
    "full": _whole(1e-4),
    "lora": _whole(1e-3, with_lora),
    "lora_labelled": _saving(_whole(1e-3, with_lora)),
    "last_layers": _policy("last_layers"),
    "last_layers_cached": _saving(_policy("last_layers"), cached=True),
    "best_cached": _saving(_policy("best"), cached=True),
    "lora_cached": _saving(_policy("last_layers"), cached=True, prepare=with_lora, learning_rate=1e-3),
    "lora_progressive": _saving(_policy("progressive"), prepare=with_lora, learning_rate=1e-3),
    "lora_occasionally_full": _saving(_policy("occasionally_full"), prepare=with_lora, learning_rate=1e-3),
    "occasionally_full": _policy("occasionally_full"),
    "progressive": _policy("progressive"),
    "best": _policy("best"),
    "sampled": _policy("sampled"),
    "rotating": _policy("rotating"),
    "lisa": _policy("lisa"),
    "random": _policy("random"),
    "paper": _policy("paper"),
    "bitfit": _whole(2e-3, biases_and_norms),
}
"""Methods by name, in the order in which they are run."""
