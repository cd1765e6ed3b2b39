"""Ctrl-C between two steps, never within one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether Ctrl-C was pressed; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note Ctrl-C; this is the signal handler."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Within the block, Ctrl-C only sets `requested`; threads other than the main one change no signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = signal.signal(signal.SIGINT, request.note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, former)
