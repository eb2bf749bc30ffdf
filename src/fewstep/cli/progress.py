"""Progress on the screen: a bar, or lines without a terminal.

The bar shows losses, speed and time left.
"""

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, HighlighterType, JustifyMethod, OverflowMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.style import Style
from rich.text import Text

from ..findings import Check
from ..names import visible
from ..notebook import clock
from ..report.words import size as said_size

CLOSED = 141  # exit status of a program whose reader has left: 128 + SIGPIPE


class Plain(Console):
    """A console that prints texts literally.

    Users' names hold brackets and colons, which rich would read as styles and emoji. Characters that a
    terminal would obey are written out.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        """Render the text literally, whatever styles the caller asks for.

        Every string that is printed passes through this method, strings in tables too.
        """
        return super().render_str(
            visible(text), style=style, justify=justify, overflow=overflow, emoji=False, markup=False, highlight=False
        )

    def on_broken_pipe(self) -> None:
        """Say that nobody reads any more, and exit.

        A training saves on exit.
        """
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            print(  # noqa: T201
                "stopped: what this was printed to is closed; the same command goes on", file=sys.stderr
            )
        raise SystemExit(CLOSED)


def show_all_letters() -> None:
    """Write out characters that the terminal's encoding lacks.

    Python would raise an error instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


console = Plain()
WORTH_SAYING = 2**20  # bytes


class Meter:
    """The progress of one task.

    `advance` takes the numbers to show next to the bar.
    """

    def __init__(self, title: str, total: int, done: int = 0, seconds_between_lines: float = 10.0) -> None:
        self.title, self.total, self.done = title, total, done
        self.between, self.began, self.first, self.last_line = seconds_between_lines, time.monotonic(), done, 0.0
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(visible(title, lines=False), total=total, completed=done, note="")

    def advance(self, done: int, numbers: Mapping[str, float]) -> None:
        """Show that `done` of `total` are finished."""
        self.done = done
        note = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.bar.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if not console.is_terminal and (now - self.last_line >= self.between or done == self.total):
            self.last_line = now
            left = (now - self.began) / max(1, done - self.first) * (self.total - done)
            console.print(f"{self.title} {done}/{self.total}  {note}  left {clock(left)}")


@contextmanager
def meter(title: str, total: int, done: int = 0) -> Iterator[Meter]:
    """Yield a `Meter` on the screen while the block runs."""
    m = Meter(title, total, done)
    with m.bar:
        yield m


def show_checks(checks: Sequence[Check], stage: str = "") -> None:
    """Print one line for each check."""
    for check in checks:
        console.print(f"  {'ok' if check.holds else 'NO':<4}{stage}{check.name:<14} {check.said}", markup=False)


class OnScreen:
    """A run's progress on the screen."""

    def say(self, text: str) -> None:
        """Print one line."""
        console.print(text, markup=False)

    @contextmanager
    def meter(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar."""
        with meter(title, total) as bar:
            yield lambda done: bar.advance(done, {})

    def writing(self, path: Path, size: int) -> None:
        """Print the size of a large file before it is written."""
        if size >= WORTH_SAYING:
            console.print(f"writing {visible(str(path), lines=False)}: {count_in(size, path.parent)}", markup=False)


def count_in(count: int, folder: Path) -> str:
    """Return `17.00 GiB, of 25.00 GiB that are free`."""
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    return f"{said_size(count)}, of {said_size(shutil.disk_usage(there).free)} that are free"
