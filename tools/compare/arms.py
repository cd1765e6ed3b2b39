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


def _today(policy: str, prepare: Prepare, learning_rate: float, *, budgeted: bool = False) -> Arm:
    """What people do today, logits at every position."""
    return Arm(prepare=prepare, policy=policy, budgeted=budgeted, learning_rate=learning_rate)


def _ours(
    policy: str, learning_rate: float = 2e-4, prepare: Prepare = unchanged, *, cached: bool = False
) -> Arm:
    """With logits at labelled positions alone."""
    return Arm(
        prepare=prepare,
        policy=policy,
        budgeted=True,
        learning_rate=learning_rate,
        labelled=True,
        cached=cached,
    )


ARMS: Mapping[str, Arm] = {
    "full": _today("last_layers", unchanged, 1e-4),
    "lora": _today("last_layers", with_lora, 1e-3),
    "last_layers": _today("last_layers", unchanged, 2e-4, budgeted=True),
    "last_layers_cached": _ours("last_layers", cached=True),
    "best_cached": _ours("best", cached=True),
    "lora_cached": _ours("last_layers", 1e-3, with_lora, cached=True),
    "occasionally_full": _ours("occasionally_full"),
    "lora_occasionally_full": _ours("occasionally_full", 1e-3, with_lora),
    "best": _ours("best"),
    "sampled": _ours("sampled"),
    "rotating": _ours("rotating"),
    "lisa": _ours("lisa"),
    "random": _today("random", unchanged, 2e-4, budgeted=True),
    "paper": _today("paper", unchanged, 2e-4, budgeted=True),
    "bitfit": _today("last_layers", biases_and_norms, 2e-3),
}
"""Methods by name, in the order in which they are run."""
