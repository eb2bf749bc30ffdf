"""Ctrl-C and SIGTERM as a request: the loop finishes its iteration, saves and leaves. A second one interrupts at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`asked` turns true at the first signal. What follows within a second is the same one: launchers pass on what their children get, too."""

    def __init__(self) -> None:
        self.asked, self.when = False, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.when > 1:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.when = True, time.monotonic()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen while the block runs, then put the old handlers back."""
    request = StopRequest()
    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
