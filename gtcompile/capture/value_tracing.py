"""Fake tensors that know their values: what is traced with them may branch on data, as may sizes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.capture.packed_sequences import in_operators
from gtcompile.torch_internals import FakeTensor, FakeTensorMode, tree_map, unset_fake_temporarily


class NumbersByOperators(TorchFunctionMode):
    """Has numbers in tensors read by an operator where torch reads their memory.

    That is what `torch.tensor` does with tensors in a list, and what runs on packed sequences.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], (list, tuple)):
            args, kwargs = (_numbers(args[0]), *args[1:]), _type_of(args[0]) | kwargs
        return in_operators(func, args)(*args, **kwargs)


def _numbers(nested: Any) -> Any:
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, nested)


def _type_of(nested: Any) -> dict[str, torch.dtype]:
    """The type that the tensors in a list have together; nothing where there is none."""
    found: list[torch.dtype] = []
    tree_map(lambda leaf: found.append(leaf.dtype) if isinstance(leaf, torch.Tensor) else None, nested)
    return {"dtype": functools.reduce(torch.promote_types, found)} if found else {}


class ValuesMode(FakeTensorMode):
    """Runs every operator on values: fake tensors are shaped by what comes out, and numbers are read off it.

    So no operator needs a fake kernel. The values are copies, and kept here alone until `forget`; from then
    on this is a fake mode like any other.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._values: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """Let all values go."""
        self._values = None

    def from_tensor(self, tensor: torch.Tensor, **settings: Any) -> FakeTensor:
        """A fake tensor like this one, whose values are copied."""
        values, self._values = self._values, None  # what is done to shape it has none
        fake = super().from_tensor(tensor, **settings)
        self._values = values
        if values is not None and fake not in values:
            with unset_fake_temporarily():
                values[fake] = tensor.detach().clone()
        return fake

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operator on values."""
        if self._values is None:
            return super().dispatch(func, types, args, kwargs or {})
        args, kwargs = tree_map(self._value, (tuple(args), dict(kwargs or {})))
        return tree_map(self._known, func(*args, **kwargs))

    def _value(self, argument: Any) -> Any:
        assert self._values is not None
        return self._values[argument] if isinstance(argument, FakeTensor) else argument

    def _known(self, result: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        assert self._values is not None
        fake = super().from_tensor(result)
        self._values[fake] = result
        return fake
