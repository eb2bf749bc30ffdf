"""Signals as requests to stop.

A training finishes the iteration, saves and exits. Anything else exits at once with a line that says why.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# A closed terminal or a lost connection is as good a reason to save as Ctrl-C. Windows knows no SIGHUP.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


class Interrupted(BaseException):
    """A signal that nobody was waiting for.

    Not a `KeyboardInterrupt`, which typer would answer with a message of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.name = number, signal.Signals(number).name


class StopRequest:
    """A signal handler that remembers the request to stop.

    `asked` turns true at the first signal. Signals within a second count as one: launchers pass on what
    their children get, too. A later signal raises `Interrupted`.
    """

    def __init__(self) -> None:
        self.asked, self.when = False, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.when > 1:
            raise Interrupted(number)
        if not self.asked:
            self.asked, self.when = True, time.monotonic()


@contextmanager
def listening(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` answer the signals while the block runs.

    The old handlers are put back afterwards. Signals that are ignored, as under nohup, stay ignored.
    """
    here = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    old = {n: known for n in NUMBERS if here and (known := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in old:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for signals while the block runs.

    A second signal ends the block at once.
    """
    request = StopRequest()
    with listening(request):
        yield request


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` within the block at a signal."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with listening(interrupt):
        yield
