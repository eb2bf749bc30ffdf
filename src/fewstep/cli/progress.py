"""Progress that a person can read: a bar with losses, speed and time left; plain lines where there is no terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


class Meter:
    """One task's progress. `advance` takes the numbers to show beside the bar."""

    def __init__(self, title: str, total: int, done: int = 0, seconds_between_lines: float = 10.0) -> None:
        self.title, self.total, self.done = title, total, done
        self.between, self.began, self.first, self.last_line = seconds_between_lines, time.monotonic(), done, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def advance(self, done: int, numbers: Mapping[str, float]) -> None:
        """`done` of `total` are finished."""
        self.done = done
        note = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.bar.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if not console.is_terminal and (now - self.last_line >= self.between or done == self.total):
            self.last_line = now
            left = (now - self.began) / max(1, done - self.first) * (self.total - done)
            console.print(f"{self.title} {done}/{self.total}  {note}  left {_clock(left)}")


@contextmanager
def meter(title: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A `Meter` on the screen while the block runs."""
    m = Meter(title, total, done)
    with m.bar:
        yield m


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
