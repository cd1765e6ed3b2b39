"""Cheaper fine-tuning by a compiler pass: compute only the weight gradients that are worth their FLOPs."""

from typing import TYPE_CHECKING, Any

from gtcompile.compiler.backend import gtcompile
from gtcompile.compiler.blocks import compile_blocks, uncompile_blocks
from gtcompile.compiler.options import CompileOptions
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.costs.dependency_graph import dependency_graph
from gtcompile.errors import BudgetError, CaptureError, GraphContractError, GTCompileError
from gtcompile.graph.flop_registry import register_flops
from gtcompile.importance.estimators import measure_importance
from gtcompile.selection import policies
from gtcompile.selection.selection import Selection, select_parameters
from gtcompile.state.trained_set import train_only, trained_parameters
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.checkpoint import load_training, save_training

if TYPE_CHECKING:
    from gtcompile.huggingface.callback import AdaptiveBackpropCallback

__all__ = [
    "AdaptiveBackprop",
    "AdaptiveBackpropCallback",
    "BackwardCosts",
    "BudgetError",
    "CaptureError",
    "CompileOptions",
    "GTCompileError",
    "GraphContractError",
    "Selection",
    "backward_costs",
    "compile_blocks",
    "dependency_graph",
    "gtcompile",
    "load_training",
    "measure_importance",
    "policies",
    "register_flops",
    "save_training",
    "select_parameters",
    "train_only",
    "trained_parameters",
    "uncompile_blocks",
]


def __getattr__(name: str) -> Any:
    """The callback, which alone needs transformers, when somebody asks for it."""
    if name == "AdaptiveBackpropCallback":
        from gtcompile.huggingface.callback import AdaptiveBackpropCallback

        return AdaptiveBackpropCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
