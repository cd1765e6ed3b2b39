"""Memory of one training step: bytes saved for backward, and the most that was allocated."""

import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gtcompile.capture.model_io import loss_of, unwrap
from gtcompile.state.restore import restored


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory that one step needs in addition to the weights."""

    saved: int
    """Bytes saved for backward, without parameters."""
    peak: int
    """Most bytes allocated at once during the step: activations, gradients, new optimizer state."""

    def as_dict(self) -> dict[str, int]:
        """Plain values under the names that the files of a run use."""
        return {"saved_bytes": self.saved, "peak_bytes": self.peak}


def passes_memory(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> StepMemory:
    """Measure forward and backward with the current trained set; nothing changes.

    Args:
        model: compiled or not.
        batch: keyword dictionary with labels, on the device.
        device: where it runs.
    """

    def forward() -> torch.Tensor:
        return loss_of(model(**batch))

    with restored(unwrap(model)):
        forward().backward()  # compiles, which is not part of a step
        unwrap(model).zero_grad()
        saved = saved_bytes(forward, unwrap(model))
        return StepMemory(saved, peak_bytes(lambda: forward().backward(), device))


class _Saved:
    """Holds a tensor that autograd saved; freed when autograd frees the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes that a loss keeps for its backward: distinct storages, without parameters and buffers."""
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()
    storages = (saved.tensor.untyped_storage() for saved in kept)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del loss
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at once while `work` ran, above what was allocated before."""
    if device.type != "cuda":
        return _peak_on_cpu(work)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device)) - int(before)


def _peak_on_cpu(work: Callable[[], object]) -> int:
    """Measure by the profiler's records of every allocation and release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it would print a line whenever it starts or stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    assert profiler.profiler is not None
    records: list[Any] = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    records.sort(key=lambda event: event.start_ns())
    held = itertools.accumulate((int(event.nbytes()) for event in records), initial=0)
    return max(held)
