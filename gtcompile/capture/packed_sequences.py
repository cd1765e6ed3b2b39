"""Packed sequences in operators alone: torch's own code reads how many go on from the memory of a tensor.

What they compute, and their FLOPs, are those of `torch.nn.utils.rnn` and of the recurrent layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from gtcompile.torch_internals import get_decompositions, pack_padded_sequence, pad_packed_sequence

aten = torch.ops.aten


def _pack(
    padded: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[time, sequences, ...]`, the longest first, what is no padding: time step by time step."""
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
    """The inverse: `[time, sequences, ...]`, and the lengths."""
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
    """A recurrent layer by torch's decomposition into operators, which is given numbers."""
    decomposition = get_decompositions([operator])[operator]

    def run(data: torch.Tensor, batch_sizes: torch.Tensor, *rest: Any) -> Any:
        return decomposition(data, batch_sizes.tolist(), *rest)

    return run


OF_PACKED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.gru: _recurrent(aten.gru.data),
    torch.lstm: _recurrent(aten.lstm.data),
    torch.rnn_relu: _recurrent(aten.rnn_relu.data),
    torch.rnn_tanh: _recurrent(aten.rnn_tanh.data),
    pack_padded_sequence: _pack,
    pad_packed_sequence: _pad,
}


def in_operators(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """What to call in place of a function of torch where it is called on packed sequences; else itself."""
    counts = arguments[1] if len(arguments) > 1 else None
    of_packed = isinstance(counts, torch.Tensor) and not counts.is_floating_point()
    return OF_PACKED.get(function, function) if of_packed else function
