"""Copies between a GPU and host memory that the host does not wait for."""

import torch

HOST = torch.device("cpu")


def to_host(value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory; from a GPU to pinned memory, without waiting for the copy.

    Before the host reads the result, `torch.cuda.synchronize` must be called. A copy back to the GPU may be
    queued at once. The memory of `value` may be freed at once: torch reuses it only behind the copy.
    """
    if value.device.type != "cuda" or hasattr(value, "__tensor_flatten__"):  # subclasses cannot be pinned
        return value.to(HOST)
    pinned = torch.empty_like(value, device=HOST, pin_memory=True)
    return pinned.copy_(value, non_blocking=True)


def await_copy(value: torch.Tensor, device: torch.device) -> None:
    """Wait for a value that a GPU may still be copying to host memory.

    `fully_shard` with offload queues copies of gradients to pinned memory on a stream of its own. It calls
    hooks on gradients before these have arrived, with that stream as the current one.

    Args:
        value: in host memory, or elsewhere: then nothing is done.
        device: that computed it.
    """
    if device.type == "cuda" and value.device == HOST:
        torch.cuda.current_stream(device).synchronize()


def fits_beside(device: torch.device, count: int) -> bool:
    """Whether a device has room for so many more bytes now. Host memory counts as having it."""
    if device.type != "cuda":
        return device.type == HOST.type
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return count + total // _SPARE <= free + unused


_SPARE = 20
"""This share of a device's memory stays free, for temporary tensors and fragments."""
