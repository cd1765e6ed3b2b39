"""Cheaper fine-tuning by a compiler pass: compute only the weight gradients that are worth their FLOPs.

Importing this package imports neither torch nor any of its own modules. Every public name is imported when it
is first used.
"""

from typing import TYPE_CHECKING

from gtcompile.lazy_names import lazy_names

if TYPE_CHECKING:
    from gtcompile import lightning as lightning
    from gtcompile import policies as policies
    from gtcompile import testing as testing
    from gtcompile.compiler.backend import gtcompile as gtcompile
    from gtcompile.compiler.blocks import compile_blocks as compile_blocks
    from gtcompile.compiler.blocks import uncompile_blocks as uncompile_blocks
    from gtcompile.compiler.options import CompileOptions as CompileOptions
    from gtcompile.costs.backward_costs import BackwardCosts as BackwardCosts
    from gtcompile.costs.backward_costs import backward_costs as backward_costs
    from gtcompile.costs.dependency_graph import dependency_graph as dependency_graph
    from gtcompile.costs.prices import StepPrices as StepPrices
    from gtcompile.errors import BudgetError as BudgetError
    from gtcompile.errors import CaptureError as CaptureError
    from gtcompile.errors import GraphContractError as GraphContractError
    from gtcompile.errors import GTCompileError as GTCompileError
    from gtcompile.graph.flop_registry import register_flops as register_flops
    from gtcompile.huggingface.callback import AdaptiveBackpropCallback as AdaptiveBackpropCallback
    from gtcompile.huggingface.labelled_logits import add_labelled_positions as add_labelled_positions
    from gtcompile.huggingface.labelled_logits import only_labelled_logits as only_labelled_logits
    from gtcompile.importance.estimators import measure_importance as measure_importance
    from gtcompile.prefix.prefix_cache import PrefixCache as PrefixCache
    from gtcompile.prices.step_prices import step_prices as step_prices
    from gtcompile.selection.selection import Selection as Selection
    from gtcompile.selection.selection import select_parameters as select_parameters
    from gtcompile.state.trained_set import train_only as train_only
    from gtcompile.state.trained_set import trained_parameters as trained_parameters
    from gtcompile.training.adaptive import AdaptiveBackprop as AdaptiveBackprop
    from gtcompile.training.checkpoint import load_training as load_training
    from gtcompile.training.checkpoint import save_training as save_training
    from gtcompile.training.trained_weights import load_trained as load_trained
    from gtcompile.training.trained_weights import save_trained as save_trained

__version__ = "0.1.0"

# To add a public name, write one line here and one above for type checkers; a test compares the two.
_NAMES = {
    "AdaptiveBackprop": "gtcompile.training.adaptive",
    "AdaptiveBackpropCallback": "gtcompile.huggingface.callback",
    "BackwardCosts": "gtcompile.costs.backward_costs",
    "BudgetError": "gtcompile.errors",
    "CaptureError": "gtcompile.errors",
    "CompileOptions": "gtcompile.compiler.options",
    "GTCompileError": "gtcompile.errors",
    "GraphContractError": "gtcompile.errors",
    "PrefixCache": "gtcompile.prefix.prefix_cache",
    "Selection": "gtcompile.selection.selection",
    "StepPrices": "gtcompile.costs.prices",
    "add_labelled_positions": "gtcompile.huggingface.labelled_logits",
    "backward_costs": "gtcompile.costs.backward_costs",
    "compile_blocks": "gtcompile.compiler.blocks",
    "dependency_graph": "gtcompile.costs.dependency_graph",
    "gtcompile": "gtcompile.compiler.backend",
    "load_training": "gtcompile.training.checkpoint",
    "load_trained": "gtcompile.training.trained_weights",
    "measure_importance": "gtcompile.importance.estimators",
    "only_labelled_logits": "gtcompile.huggingface.labelled_logits",
    "register_flops": "gtcompile.graph.flop_registry",
    "save_trained": "gtcompile.training.trained_weights",
    "save_training": "gtcompile.training.checkpoint",
    "select_parameters": "gtcompile.selection.selection",
    "step_prices": "gtcompile.prices.step_prices",
    "train_only": "gtcompile.state.trained_set",
    "trained_parameters": "gtcompile.state.trained_set",
    "uncompile_blocks": "gtcompile.compiler.blocks",
}
_MODULES = {
    "lightning": "gtcompile.lightning",
    "policies": "gtcompile.policies",
    "testing": "gtcompile.testing",
}

__all__ = sorted({*_NAMES, *_MODULES})
__getattr__ = lazy_names(__name__, _NAMES, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
