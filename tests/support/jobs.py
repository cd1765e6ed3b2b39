"""Jobs for a process of its own; this module imports nothing that takes long."""

import os
import time
from collections.abc import Iterator


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
