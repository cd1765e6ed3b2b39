"""Gradients that are kept from one batch to the next."""

from collections.abc import Iterable

import torch
from torch import nn

from gtcompile.distributed.fsdp import local
from gtcompile.state.host_memory import fits_beside, to_host

TEMPORARY = 6
"""Copies of the largest parameter that exist while its update is computed."""


class KeptGradients:
    """Keeps gradients on their device if all fit there, else in host memory.

    Whether they fit is decided when the first one is kept. At that moment the activations of a batch are
    alive as well, so they have room in the later batches too.

    Args:
        parameters: those whose gradients are kept.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        sizes = [local(parameter).nbytes for parameter in parameters]
        self._bytes = sum(sizes) + TEMPORARY * max(sizes)
        self._on_device: bool | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, fqn: str, gradient: torch.Tensor) -> None:
        """Keep a gradient, instead of an earlier one of the same parameter."""
        if self._on_device is None:
            self._on_device = fits_beside(gradient.device, self._bytes)
        self._kept[fqn] = gradient if self._on_device else to_host(gradient)

    def take(self, fqn: str, device: torch.device) -> torch.Tensor:
        """Hand a gradient back, on a device."""
        return self._kept.pop(fqn).to(device, non_blocking=True)

    def drop(self, fqns: Iterable[str]) -> None:
        """Forget some gradients, if they are kept."""
        for fqn in fqns:
            self._kept.pop(fqn, None)
