"""Models that a Python function makes, named `module:function`."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def is_factory(name: str) -> bool:
    """Whether a model's name is of the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not Path(name).exists()


def call_factory(name: str) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """The model that `module:function` returns, with its batch where it returns both.

    The working directory is searched for the module as `python -m` would.

    Raises:
        ValueError: no such module or function (names near ones), arguments are needed, or no model came back.
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
        near = difflib.get_close_matches(function_name, dir(module), n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"{module_name} has no function {function_name!r}{hint}")
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
    """Names of the arguments without which a function cannot be called."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def language_model(name: str, made: nn.Module) -> PreTrainedModel:
    """A model that came without a batch, and that a batch of tokens can be made for.

    Raises:
        ValueError: for any other model.
    """
    if isinstance(made, PreTrainedModel):
        return made
    raise ValueError(
        f"{name} returned a {type(made).__name__} and no batch; return both: model, keyword dictionary"
    )
