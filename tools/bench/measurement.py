"""Time several functions fairly against each other."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one quantity: median, least and greatest."""

    median: float
    low: float
    high: float

    def __truediv__(self, unit: float) -> "Spread":
        """Convert to another unit."""
        return Spread(self.median / unit, self.low / unit, self.high / unit)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest of at least one measurement."""
    values = sorted(values)
    return Spread(statistics.median(values), values[0], values[-1])


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, including the work that it queued on the device."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Timed:
    """A function to time in turns with others."""

    prepare: Callable[[], object]
    """Runs before each turn, untimed."""
    run: Callable[[], object]
    """The function that is timed."""


def alternate(
    functions: Mapping[Key, Timed], rounds: int, device: torch.device, runs: int = 1
) -> dict[Key, list[float]]:
    """Wall seconds of each function in each round: the fastest of `runs` calls.

    They take turns, every other round in reverse, so that other work on the machine slows all of them alike.
    """
    times: dict[Key, list[float]] = {key: [] for key in functions}
    order = list(functions)
    for _ in range(rounds):
        for key in order:
            functions[key].prepare()
            times[key].append(min(seconds(functions[key].run, device) for _ in range(runs)))
        order.reverse()
    return times


def ratios(times: Iterable[float], base: Iterable[float]) -> Spread:
    """How many times as long one function took as another, round by round."""
    return spread(one / other for one, other in zip(times, base, strict=True))


def describe_machine(device: torch.device) -> str:
    """The machine and torch version in words, with the load of a CPU."""
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{os.cpu_count()} x {_processor()}, torch {torch.__version__}; {load}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
