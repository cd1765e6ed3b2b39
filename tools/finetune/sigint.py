"""Ctrl-C between two steps, never within one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether Ctrl-C was pressed; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Within the block Ctrl-C only sets `requested`; outside the main thread signals are left alone."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = signal.signal(signal.SIGINT, request.note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, former)
