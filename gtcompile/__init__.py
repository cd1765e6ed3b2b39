"""Cheaper fine-tuning by a compiler pass: compute only the weight gradients that are worth their FLOPs."""

from typing import TYPE_CHECKING, Any

from gtcompile.adaptive import AdaptiveBackprop
from gtcompile.backend import gtcompile
from gtcompile.blocks import compile_blocks, uncompile_blocks
from gtcompile.dependencies import BackwardCosts, backward_costs
from gtcompile.errors import BudgetError, CaptureError, GraphContractError, GTCompileError
from gtcompile.importance import measure_importance
from gtcompile.selection import Selection, select_parameters
from gtcompile.trained import train_only, trained_parameters
from gtcompile.training_state import load_training, save_training

if TYPE_CHECKING:
    from gtcompile.huggingface import AdaptiveBackpropCallback

__all__ = [
    "AdaptiveBackprop",
    "AdaptiveBackpropCallback",
    "BackwardCosts",
    "BudgetError",
    "CaptureError",
    "GTCompileError",
    "GraphContractError",
    "Selection",
    "backward_costs",
    "compile_blocks",
    "gtcompile",
    "load_training",
    "measure_importance",
    "save_training",
    "select_parameters",
    "train_only",
    "trained_parameters",
    "uncompile_blocks",
]


def __getattr__(name: str) -> Any:
    """The callback, which alone needs transformers, when somebody asks for it."""
    if name == "AdaptiveBackpropCallback":
        from gtcompile.huggingface import AdaptiveBackpropCallback

        return AdaptiveBackpropCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
