"""Fake tensors with known values, so that traced code may branch on data."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gtcompile.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    get_decompositions,
    pack_padded_sequence,
    pad_packed_sequence,
    tree_map,
    unset_fake_temporarily,
)

aten = torch.ops.aten


class ValuesMode(FakeTensorMode):
    """A fake tensor mode that runs every operator on real values.

    Shapes of results, and numbers that are read from tensors, come from these values, so no operator needs a
    fake kernel. The mode holds copies of all values until `forget`. After that it is an ordinary fake mode.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._values: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """Free all values."""
        self._values = None

    def from_tensor(self, tensor: torch.Tensor, **settings: Any) -> FakeTensor:
        """Return a fake tensor for a real one, and store a copy of its values."""
        # creating a fake tensor calls operators on fake tensors that have no values yet
        values, self._values = self._values, None
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
        """Run one operator on the stored values, and store the values of its results."""
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


class NoMemoryAccess(TorchFunctionMode):
    """Replaces torch functions whose C++ code reads or writes the memory of tensors: fake tensors have none.

    These are `torch.tensor` of a list of tensors, all functions on packed sequences, and `ctc_loss` with
    lengths as numbers. The replacements consist of operators with equal results and equal FLOPs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, or its replacement."""
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], (list, tuple)):
            args, kwargs = (_numbers(args[0]), *args[1:]), _common_dtype(args[0]) | kwargs
        if func in ON_PACKED and _are_counts(args):
            func = ON_PACKED[func]
        if func in (functional.ctc_loss, torch.ctc_loss):
            args, kwargs = _lengths_as_tensors(args, kwargs)
        return func(*args, **kwargs)


def _numbers(nested: Any) -> Any:
    """Convert the tensors in a nested list to numbers."""
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, nested)


def _common_dtype(nested: Any) -> dict[str, torch.dtype]:
    """Return the argument `dtype` that the tensors in a list promote to; empty if there is no tensor."""
    found: list[torch.dtype] = []
    tree_map(lambda leaf: found.append(leaf.dtype) if isinstance(leaf, torch.Tensor) else None, nested)
    return {"dtype": functools.reduce(torch.promote_types, found)} if found else {}


def _are_counts(arguments: Sequence[Any]) -> bool:
    """Whether the second argument holds sizes or lengths, which means that sequences are packed."""
    counts = arguments[1] if len(arguments) > 1 else None
    return isinstance(counts, torch.Tensor) and not counts.is_floating_point()


def _pack(
    padded: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the padding of `[time, sequences, ...]`, longest sequence first; concatenate the time steps.

    Returns:
        The packed steps, `[sum of lengths, ...]`, and the number of sequences in each step.
    """
    steps = padded.transpose(0, 1) if batch_first else padded
    ends = lengths.tolist()
    sizes = [sum(end > time for end in ends) for time in range(ends[0])]
    packed = torch.cat([steps[time, :size] for time, size in enumerate(sizes)])
    return packed, torch.tensor(sizes)


def _pad(
    packed: torch.Tensor,
    batch_sizes: torch.Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert `_pack`: return `[time, sequences, ...]`, and the lengths."""
    sizes = batch_sizes.tolist()
    sizes += [0] * (total_length - len(sizes))
    behind = (0, 0) * (packed.dim() - 1)
    steps = [
        functional.pad(step, (*behind, 0, sizes[0] - len(step)), value=padding_value)
        for step in packed.split(sizes)
    ]
    lengths = [sum(size > sequence for size in sizes) for sequence in range(sizes[0])]
    return torch.stack(steps, dim=int(batch_first)), torch.tensor(lengths)


def _recurrent(operator: Any) -> Callable[..., Any]:
    """Return torch's decomposition of a recurrent layer on packed sequences, adapted to tensor sizes."""
    decomposition = get_decompositions([operator])[operator]

    def run(data: torch.Tensor, batch_sizes: torch.Tensor, *rest: Any) -> Any:
        return decomposition(data, batch_sizes.tolist(), *rest)

    return run


ON_PACKED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.gru: _recurrent(aten.gru.data),
    torch.lstm: _recurrent(aten.lstm.data),
    torch.rnn_relu: _recurrent(aten.rnn_relu.data),
    torch.rnn_tanh: _recurrent(aten.rnn_tanh.data),
    pack_padded_sequence: _pack,
    pad_packed_sequence: _pad,
}
"""Replacements for torch functions that are called on packed sequences."""


def _lengths_as_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert lengths to tensors: `ctc_loss` would write numbers into the memory of a tensor."""
    tensors = (*args[:2], *map(torch.as_tensor, args[2:4]), *args[4:])
    return tensors, {
        name: torch.as_tensor(value) if name in ("input_lengths", "target_lengths") else value
        for name, value in kwargs.items()
    }
