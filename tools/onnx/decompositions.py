"""Operators that torch's exporter cannot lower to ONNX, written as operators that every runtime has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gtcompile.errors import CaptureError

aten = torch.ops.aten
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def convolution_gradients(
    gradient: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Gradients:
    """Compute what `aten.convolution_backward` returns, for one to three spatial dimensions.

    Args:
        gradient: of the output, rows x output channels x output positions.
        value: the input, rows x input channels x positions.
        weight: output channels x input channels of a group x taps.
        bias_sizes: shape of the bias; not used.
        stride: one per spatial dimension, or one for all; so are `padding` and `dilation`.
        padding: positions on either side.
        dilation: distance of taps.
        transposed: must be false.
        output_padding: of transposed convolutions; not used.
        groups: of channels.
        output_mask: which of the three gradients are wanted.

    Returns:
        Gradients of input, weight and bias; None where `output_mask` is false.

    Raises:
        CaptureError: the convolution is transposed.
    """
    if transposed:
        raise CaptureError(
            "the gradient of a transposed convolution has no ONNX lowering; freeze what only its backward "
            "serves"
        )
    spatial = weight.dim() - 2
    stride, padding, dilation = (_each(list(sizes), spatial) for sizes in (stride, padding, dilation))
    of_input = of_weight = of_bias = None
    if output_mask[0]:
        of_input = _of_input(gradient, value, weight, stride, padding, dilation, groups)
    if output_mask[1]:
        of_weight = _of_weight(gradient, value, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        of_bias = gradient.sum([0, *range(2, gradient.dim())])
    return of_input, of_weight, of_bias


def _each(sizes: list[int], spatial: int) -> list[int]:
    return sizes * spatial if len(sizes) == 1 else sizes


def _of_input(
    gradient: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The transposed convolution; output padding restores the last positions that a stride did not read."""
    left = [
        0 if step == 1 else value.shape[2 + d] - ((gradient.shape[2 + d] - 1) * step - 2 * pad + reach + 1)
        for d, (step, pad, reach) in enumerate(zip(stride, padding, _reaches(weight, dilation), strict=True))
    ]
    found: torch.Tensor = aten.convolution(
        gradient, weight, None, stride, padding, dilation, True, left, groups
    )
    return found


def _reaches(weight: torch.Tensor, dilation: Sequence[int]) -> list[int]:
    return [step * (weight.shape[2 + d] - 1) for d, step in enumerate(dilation)]


def _of_weight(
    gradient: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The input convolved with the output's gradient: rows act as channels, stride and dilation swap."""
    rows, channels = value.shape[:2]
    places = list(range(3, value.dim() + 1))
    by_group = value.reshape(rows, groups, channels // groups, *value.shape[2:])
    images = by_group.permute(2, 1, 0, *places).reshape(channels // groups, groups * rows, *value.shape[2:])
    zeros = [0] * len(places)
    found: torch.Tensor = aten.convolution(
        images, gradient.transpose(0, 1), None, dilation, padding, stride, False, zeros, groups
    )
    for d in range(2, weight.dim()):
        found = found.narrow(d, 0, weight.shape[d])  # drop what the stride did not read
    return found.transpose(0, 1)


def _silu_backward(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(value)
    return gradient * sigmoid * (1 + value * (1 - sigmoid))


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return source.to(target.dtype).expand(target.shape).clone()


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_gradients,
    aten.silu_backward.default: _silu_backward,
    aten.copy.default: _copy,
    aten.fill.Tensor: _copy,
}
"""From an operator to a function that computes the same.

`convolution_backward` has neither a lowering nor a decomposition in torch. `silu_backward` has no lowering,
and an export does not decompose it. A copy or a fill that broadcasts is lowered to a cast, which does not
broadcast.
"""
