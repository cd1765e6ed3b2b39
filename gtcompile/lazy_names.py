"""Public names of a package that are imported on first use, so that importing the package itself is quick."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package (PEP 562) that imports public names when they are first used.

    Args:
        package: the package's `__name__`.
        names: public name -> dotted name of the module that defines it under the same name.
        modules: public name -> dotted name of the module that it stands for.

    Returns:
        The function to assign to the package's `__getattr__`. It raises `AttributeError` for any other name.
    """

    def get(name: str) -> Any:
        if name in names:
            value = getattr(importlib.import_module(names[name]), name)
        elif modules is not None and name in modules:
            value = importlib.import_module(modules[name])
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next use finds it without this function
        return value

    return get
