"""The methods that are compared. This module imports no torch, so that their names can be checked at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from gtcompile.tools.models.adapters import add_lora

if TYPE_CHECKING:
    from torch import nn

_LORA_RANK = 16
Prepare: TypeAlias = "Callable[[nn.Module], nn.Module]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method of fine-tuning."""

    about: str
    """What it trains, in words."""
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

    def __str__(self) -> str:
        savings = {
            "logits are computed at labelled positions alone": self.labelled,
            "the frozen prefix is computed once per text": self.cached,
        }
        return "; ".join([self.about, *(saving for saving, used in savings.items() if used)])

    @property
    def adapted(self) -> bool:
        """Whether the model gets adapters, which need peft."""
        return self.prepare is with_lora


def unchanged(model: "nn.Module") -> "nn.Module":
    """The model as it is."""
    return model


def with_lora(model: "nn.Module") -> "nn.Module":
    """Add low-rank adapters to all linear layers except the head."""
    return add_lora(model, _LORA_RANK)


def biases_and_norms(model: "nn.Module") -> "nn.Module":
    """BitFit: train only biases. Scales of norms count as biases, since Llama has none."""
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return model


def _whole(about: str, learning_rate: float, prepare: Prepare = unchanged) -> Arm:
    return Arm(
        about=about, prepare=prepare, policy="last_layers", budgeted=False, learning_rate=learning_rate
    )


def _policy(name: str, about: str) -> Arm:
    return Arm(about=about, prepare=unchanged, policy=name, budgeted=True, learning_rate=2e-4)


def _saving(arm: Arm, about: str, **changes: Any) -> Arm:
    return replace(arm, about=about, labelled=True, **changes)


_FULL = _whole("all weights", 1e-4)
_LORA = _whole(f"adapters of rank {_LORA_RANK} in all linear layers of all blocks (LoRA)", 1e-3, with_lora)
_LAST = _policy(
    "last_layers", "all weights of the last blocks that fit the budget, as by requires_grad_(False)"
)
_BEST = _policy("best", "the most important weights that fit the budget, selected anew during the training")
_PROGRESSIVE = _policy(
    "progressive", "all weights at first, then those of fewer and fewer of the last blocks"
)
_OCCASIONALLY = _policy("occasionally_full", "the last blocks at most steps, all weights at random steps")
_ADAPTERS = {"prepare": with_lora, "learning_rate": _LORA.learning_rate}

ARMS: Mapping[str, Arm] = {
    "full": _FULL,
    "lora": _LORA,
    "lora_labelled": _saving(_LORA, "as lora"),
    "last_layers": _LAST,
    "last_layers_cached": _saving(_LAST, "as last_layers", cached=True),
    "best_cached": _saving(_BEST, "as best", cached=True),
    "lora_cached": _saving(
        _LAST, "adapters of the last blocks that fit the budget", cached=True, **_ADAPTERS
    ),
    "lora_progressive": _saving(
        _PROGRESSIVE,
        "adapters of all blocks at first, then of fewer and fewer of the last blocks",
        **_ADAPTERS,
    ),
    "lora_occasionally_full": _saving(
        _OCCASIONALLY, "adapters of the last blocks at most steps, all adapters at random steps", **_ADAPTERS
    ),
    "occasionally_full": _OCCASIONALLY,
    "progressive": _PROGRESSIVE,
    "best": _BEST,
    "sampled": _policy("sampled", "weights drawn by their importance, others at every step"),
    "rotating": _policy("rotating", "one block at a time, in turn, as BAdam does"),
    "lisa": _policy("lisa", "two random blocks and all weights outside of blocks, as LISA does"),
    "random": _policy("random", "random weights within the budget, others at every step"),
    "paper": _policy("paper", "what GreenTrainer's estimator and dynamic programme choose"),
    "bitfit": _whole("biases and the scales of norms alone (BitFit)", 2e-3, biases_and_norms),
}
"""Methods by name, in the order in which they are run."""
