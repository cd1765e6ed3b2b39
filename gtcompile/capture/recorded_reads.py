"""Tracing with the numbers that one run of the forward read from tensors, but without any other value.

Losses of trainers read numbers from tensors, mostly for their logs. Fake tensors have none. One run of the
forward on real values records what is read; the trace on fake tensors then reads the recorded results. It
holds no values, so it needs no memory beyond that of the recorded run, a forward as in training.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gtcompile.torch_internals import FakeTensorMode, TorchDispatchMode, tree_map

Read = tuple[object, list[tuple[int, ...]], Any]
"""The operator, the shapes of its inputs, and its result: a number, or tensors without memory."""


class RecordingMode(TorchDispatchMode):
    """Records the results of all operators whose result, or whose result's shape, depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: list[Read] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator on real values."""
        result = func(*args, **(kwargs or {}))
        if depends_on_values(func, args):
            self.reads.append((func, _shapes(args), tree_map(_without_memory, result)))
        return result


class ReplayMode(FakeTensorMode):
    """A fake tensor mode in which such operators return what was recorded, in the same order.

    Args:
        reads: what a `RecordingMode` recorded in a run of the same forward.
    """

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._reads = tuple(reads)
        self._waiting: deque[Read] = deque()

    def begin(self) -> None:
        """Start again from the first read; to be called before every run of the forward."""
        self._waiting = deque(self._reads)

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operator on fake tensors, or return its recorded result.

        Raises:
            UnrecordedReadError: the recorded run did not read this.
        """
        if not depends_on_values(func, args):
            return super().dispatch(func, types, args, kwargs or {})
        recorded = self._waiting.popleft() if self._waiting else None
        if recorded is None or recorded[:2] != (func, _shapes(args)):
            raise UnrecordedReadError(f"{func} reads values that the forward on real tensors did not read")
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        return tree_map(lambda value: self._fake(value, device), recorded[2])

    def _fake(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with self:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


class UnrecordedReadError(Exception):
    """The trace reads something else from tensors than the recorded run."""


def depends_on_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the result of an operator is a number, or a tensor of a shape, that depends on values."""
    if func is torch.ops.aten.index.Tensor:  # only masks select a number of elements that depends on values
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _shapes(args: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in args if isinstance(value, torch.Tensor)]


def _without_memory(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value
