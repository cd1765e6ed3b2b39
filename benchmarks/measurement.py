"""Measurements that only the benchmarks need: duels, intervals, fresh processes and targets."""

import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from gtcompile.tools.bench.measurement import Spread, seconds

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's `mallopt`: the least bytes that are mapped, and that are given back."""
KEPT_BYTES = 1 << 30
Result = TypeVar("Result")


def in_turns(
    one: Callable[[], object], other: Callable[[], object], pairs: int, device: torch.device
) -> list[float]:
    """Ratios of one function's time to another's, each pair called right after one another.

    Whatever slows the machine for longer than a call slows both.

    Args:
        one: numerator.
        other: denominator.
        pairs: how many ratios to measure.
        device: where both run.
    """
    found = []
    for pair in range(pairs):
        if pair % 2:
            base, taken = seconds(other, device), seconds(one, device)
        else:
            taken, base = seconds(one, device), seconds(other, device)
        found.append(taken / base)
    return found


def median_interval(values: Iterable[float]) -> Spread:
    """The median of at least one measurement with its 95 % confidence interval.

    The interval ends at two of the measurements, since the number of measurements below the true median is
    binomial (in the normal approximation: Conover, Practical Nonparametric Statistics, 3.2). With few
    measurements the interval goes from the least to the greatest.
    """
    values = sorted(values)
    below = max(int(len(values) / 2 - 0.98 * len(values) ** 0.5), 0)
    return Spread(statistics.median(values), values[below], values[-1 - below])


def verdict(value: float, target: float) -> str:
    """Say whether a measurement keeps its upper limit."""
    return f"{'met' if value <= target else 'MISSED'} (at most {target:.3g})"


def keep_memory() -> None:
    """Make this process keep the memory it frees, as the allocator of a GPU does; works with glibc only.

    Otherwise the first step that is larger than the one before pays for pages that the operating system took
    back, and that time would be charged to the trained set.
    """
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to any more, and give a GPU's memory back to other processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a new interpreter, which shares neither memory nor compiled code with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
