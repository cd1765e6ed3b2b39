"""One training step of a model, and the difference between two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROUNDING = 32
"""Greatest allowed difference of a tensor, in units of its greatest element and of its type's precision."""
EAGER_ROUNDING = 8
"""Greatest allowed difference, in units of the error that eager PyTorch makes itself. It is larger than
`ROUNDING` where large terms of a sum cancel."""
GREATEST_EAGER_ROUNDING = 1024
"""Greatest error of eager PyTorch that counts as rounding, in units as above. In double precision random
operators may draw other numbers: then the two steps differ by more, and not by rounding."""
SEED = 0
"""Seed of every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one training step does."""

    requires_grad: bool
    """Whether the loss requires grad."""
    values: Mapping[str, torch.Tensor | None]
    """The loss, the gradients of all parameters, and the buffers after the step."""
    flops: int


UNIT = {"unit": torch.ones(())}


def step(run: nn.Module, model: nn.Module, counter: Any) -> Step:
    """Run one training step of a model, compiled or not, and count its FLOPs."""
    model.zero_grad()
    torch.manual_seed(SEED)
    with counter as counted:
        loss = run(**UNIT)
        if loss.requires_grad:
            loss.backward()
    values = {"the loss": loss.detach().clone()}
    values |= {f"the gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    values |= {f"the buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return Step(
        requires_grad=loss.requires_grad,
        values={name: None if value is None else value.clone() for name, value in values.items()},
        flops=counted.get_total_flops(),
    )


def difference(actual: Step, expected: Step, exact: Step | None = None) -> str:
    """The first difference between two steps in words, FLOPs and rounding aside; empty if there is none.

    Args:
        actual: in compiled code.
        expected: in eager PyTorch.
        exact: in eager PyTorch with double precision, which shows how much the expected step is rounded.
    """
    if actual.requires_grad != expected.requires_grad:
        return f"the loss {'requires' if actual.requires_grad else 'does not require'} grad"
    for name, value in expected.values.items():
        other = actual.values[name]
        if (other is None) != (value is None):
            return f"{name} is {'None' if other is None else 'not None'}"
        if value is None or other is None:
            continue
        allowed = _rounding(value, exact.values[name] if exact else None)
        if (distance := _distance(other, value)) > allowed:
            return f"{name} differs by {distance:.1e} units of rounding, {allowed:.0f} are allowed"
    return ""


def _rounding(expected: torch.Tensor, exact: torch.Tensor | None) -> float:
    """How much a tensor may differ from the expected one."""
    if exact is None:
        return ROUNDING
    error = _distance(exact.to(expected.dtype), expected)
    return max(ROUNDING, EAGER_ROUNDING * error) if error <= GREATEST_EAGER_ROUNDING else ROUNDING


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Greatest difference, in units of the greatest element and of the type's precision.

    It is infinite for tensors of two kinds, and for infinite elements or NaN in one of them alone.
    """
    if (left.shape, left.dtype, left.layout) != (right.shape, right.dtype, right.layout):
        return float("inf")
    left, right = left.to_dense(), right.to_dense()
    finite = left.isfinite() & right.isfinite()
    same = (left == right) | (left.isnan() & right.isnan())
    if not bool((finite | same).all()):
        return float("inf")
    if bool(same.all()):
        return 0.0
    exact = torch.finfo(left.dtype).eps if left.is_floating_point() or left.is_complex() else 1
    largest = right.masked_fill(~finite, 0).abs().max()
    apart = left.masked_fill(~finite, 0) - right.masked_fill(~finite, 0)
    return float(apart.abs().max() / largest / exact)
