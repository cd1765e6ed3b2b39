"""Methods with code objects of their own.

Dynamo keeps compiled code, and counts recompilations, by code object. All blocks of transformers run one
wrapper function around their forward. Without copies, another compiled model in the process would use up the
recompile limit of this one, and this one's blocks would silently run eagerly.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


class CodeCopies:
    """Copies of methods. Methods with the same function share one new code object."""

    def __init__(self) -> None:
        self._copies: dict[FunctionType, FunctionType] = {}

    def of(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method bound to this collection's copy of its function.

        Callables that are not Python methods are returned unchanged.
        """
        if not isinstance(method, MethodType) or not isinstance(method.__func__, FunctionType):
            return method
        function = method.__func__
        if function not in self._copies:
            self._copies[function] = _copy(function)
        return MethodType(self._copies[function], method.__self__)


def _copy(function: FunctionType) -> FunctionType:
    code = function.__code__.replace()
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(made).update(vars(function))
    return made
