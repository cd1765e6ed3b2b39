"""Low-rank adapters (LoRA) in the linear layers of a model, made by peft. This module imports no torch."""

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
"""Stands for all linear layers except the head."""
INSTALL = 'pip install "gtcompile[lora]"'


def check_peft() -> None:
    """Refuse to make adapters without peft.

    Raises:
        ImportError: says how to install it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"LoRA needs peft: {INSTALL}")


def add_lora(
    model: "nn.Module", rank: int, *, alpha: int | None = None, targets: tuple[str, ...] = (ALL_LINEAR,)
) -> "nn.Module":
    """Add low-rank adapters to linear layers of a language model, and freeze everything else.

    Args:
        model: of transformers, on any device.
        rank: of the adapters.
        alpha: adapters are scaled by it over the rank; None takes twice the rank.
        targets: the last parts of the names of the layers, or `all-linear` alone.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no such layer.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        task_type="CAUSAL_LM" if decoder else "SEQ_2_SEQ_LM",
    )
    known = _linear_layers(model)
    if not known:
        raise ValueError(f"LoRA needs linear layers, and {type(model).__name__} has none that peft can adapt")
    if unknown := [target for target in targets if target not in (*known, ALL_LINEAR)]:
        raise ValueError(
            f"{type(model).__name__} has no linear layers called {', '.join(unknown)}; it has, beside the "
            f"head, {', '.join(sorted(known))}"
        )
    with warnings.catch_warnings():
        # GPT-2 keeps its weights transposed; peft finds out by itself, and says so
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def adapted_layers(model: "nn.Module") -> int:
    """Number of layers that have a low-rank adapter."""
    return sum(hasattr(module, "lora_A") for module in model.modules())


def _linear_layers(model: Any) -> set[str]:
    """The last parts of the names of the layers that `all-linear` stands for."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
