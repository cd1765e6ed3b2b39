"""Models that a Python function returns, named `module:function`."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gtcompile.graph.names import near_names


def is_factory(name: str) -> bool:
    """Whether a model's name is of the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not Path(name).exists()


def call_factory(name: str) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """Call `module:function` and return its model, with its batch if it returns both.

    Like `python -m`, this also searches the working directory for the module.

    Raises:
        ValueError: there is no such module or function, it needs arguments, or it returns no model.
    """
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import the module of {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = near_names(function_name, [name for name in dir(module) if not name.startswith("_")])
        raise ValueError(f"{module_name} has no function {function_name!r}; {near}")
    needed = _needed_arguments(function)
    if needed:
        raise ValueError(
            f"expected {name} to be called without arguments, but it needs {', '.join(needed)}; name a "
            f"function that calls it and returns the model"
        )
    made = function()
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (batch is None or isinstance(batch, Mapping)):
        raise ValueError(
            f"expected {name} to return a model, or a model and its batch as a keyword dictionary, "
            f"got {type(made).__name__}"
        )
    return model, batch


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of a function's required arguments."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def language_model(name: str, made: nn.Module) -> PreTrainedModel:
    """Return a factory's model if a batch of tokens can be made for it.

    Raises:
        ValueError: it is no model of transformers.
    """
    if isinstance(made, PreTrainedModel):
        return made
    raise ValueError(
        f"{name} returned a {type(made).__name__} and no batch; return both: model, keyword dictionary"
    )
