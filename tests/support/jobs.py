"""Jobs for a process of its own; this module imports nothing that takes long."""

import os
import time
from collections.abc import Iterator

from benchmarks.processes import Job, Result, run_jobs


def count_up(last: int, _deadline: float) -> Iterator[int]:
    yield from range(last)


def fail(_deadline: float) -> Iterator[str]:
    yield "a part"
    raise RuntimeError("it broke")


def die(_deadline: float) -> Iterator[str]:
    os._exit(3)
    yield ""


def loop(_deadline: float) -> Iterator[str]:
    yield "a part"
    time.sleep(600)


def tell_and_loop(_deadline: float) -> Iterator[int]:
    yield os.getpid()
    time.sleep(600)


def start_another(_deadline: float) -> Iterator[int]:
    """A job that has a job of its own; yields the number of its process."""
    for message in run_jobs([Job("another", tell_and_loop, ())], limit_s=600):
        assert isinstance(message, Result), message
        yield message.value
