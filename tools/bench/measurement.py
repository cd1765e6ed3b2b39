"""Time rivals fairly, and say whether a target is met."""

import ctypes
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""What glibc's `mallopt` calls the least bytes that are mapped, and that are given back."""
KEPT_BYTES = 1 << 30
Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float

    def __truediv__(self, unit: float) -> "Spread":
        """The same measurements in another unit."""
        return Spread(self.median / unit, self.low / unit, self.high / unit)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest of at least one measurement."""
    values = sorted(values)
    return Spread(statistics.median(values), values[0], values[-1])


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, work it queued on the device included."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to time in turns with others."""

    prepare: Callable[[], object]
    """Runs first, untimed, every time."""
    run: Callable[[], object]
    """What is timed."""


def alternate(
    contenders: Mapping[Key, Contender], rounds: int, device: torch.device, runs: int = 1
) -> dict[Key, list[float]]:
    """Wall seconds of each contender in each round, of the fastest of some runs.

    They take turns, every other round in reverse, so that what else happens on the machine falls on all of
    them.
    """
    times: dict[Key, list[float]] = {key: [] for key in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for key in order:
            contenders[key].prepare()
            times[key].append(min(seconds(contenders[key].run, device) for _ in range(runs)))
        order.reverse()
    return times


def in_turns(
    one: Callable[[], object], other: Callable[[], object], pairs: int, device: torch.device
) -> list[float]:
    """How many times as long one call takes as a call of another right before or after it, pair by pair.

    Whatever slows the machine for longer than a call slows both.
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
    """The median of at least one measurement, and where it lies with 95 % confidence.

    The interval is between two of the measurements: the number of them below the true median is binomial, in
    the normal approximation (Conover, Practical Nonparametric Statistics, 3.2). Of few, the least and the
    greatest.
    """
    values = sorted(values)
    below = max(int(len(values) / 2 - 0.98 * len(values) ** 0.5), 0)
    return Spread(statistics.median(values), values[below], values[-1 - below])


def ratios(times: Iterable[float], base: Iterable[float]) -> Spread:
    """Round by round, how many times as long one rival took as another."""
    return spread(one / other for one, other in zip(times, base, strict=True))


def verdict(value: float, target: float) -> str:
    """Whether a measurement keeps to its upper limit, said plainly."""
    return f"{'met' if value <= target else 'MISSED'} (at most {target:.3g})"


def keep_memory() -> None:
    """Have this process keep the memory it frees, as the allocator of a GPU does; with glibc alone.

    Else the first step that is larger than the one before pays for pages that the operating system took back,
    whatever is trained and however.
    """
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function returns in a new interpreter, whose memory and compiled code are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def describe_machine(device: torch.device) -> str:
    """What the numbers were measured on, and how busy it was."""
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{os.cpu_count()} x {_processor()}, torch {torch.__version__}; {load}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
