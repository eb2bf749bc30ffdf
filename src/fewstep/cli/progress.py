"""Progress on the screen.

A terminal has one live line, a log has plain lines. `--quiet` shows none. With `--json` they go to the standard
error, and the standard output has the result alone.
"""

import io
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, HighlighterType, JustifyMethod, OverflowMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.text import Text

from ..findings import Check
from ..names import visible
from ..notebook import clock, time_left
from ..report.words import size as said_size

CLOSED = 141  # exit status of a program whose reader has left: 128 + SIGPIPE


class Plain(Console):
    """A console that prints texts literally.

    Users' names hold brackets and colons, which rich would read as styles and emoji. Characters that a
    terminal would obey are written out.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.shows_progress, self.json = True, False

    @property
    def live(self) -> bool:
        """Whether a line on the screen can change."""
        return self.is_terminal and self.is_interactive

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
PATIENCE = 2.0  # seconds before something is worth a line
BETWEEN, MOST_BETWEEN = 10.0, 60.0  # seconds between lines of a log; the time doubles


def set_output(quiet: bool | None = None, as_json: bool | None = None) -> None:
    """Set what goes to the screen, and where: `--quiet` and `--json`."""
    if quiet is not None:
        console.shows_progress = not quiet
    if as_json is not None:
        console.json = console.stderr = as_json
        console.is_interactive = console.is_terminal and not console.is_dumb_terminal  # of the stream from now on


def put_result(value: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON.

    Only where that was asked for. Numbers that JSON lacks become null, and paths texts.
    """
    if console.json:
        sys.stdout.write(json.dumps(_plain(value), ensure_ascii=True) + "\n")
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


@contextmanager
def working(title: str, total: int = 0) -> Iterator["Working"]:
    """Show that something goes on, where it takes longer than `PATIENCE`.

    What it yields is told how many of `total` are done, from which the time left is estimated. Without a `total` the
    time so far is shown.
    """
    state, over = Working(title, total), threading.Event()
    shown = threading.Thread(target=_show_working, args=(state, over), daemon=True)
    if console.shows_progress and not console.quiet:
        shown.start()
    try:
        yield state
    finally:
        over.set()
        if shown.ident is not None:
            shown.join()


@dataclass
class Working:
    """How far something is that goes on."""

    title: str
    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def __call__(self, done: int) -> None:
        """Say how many are done."""
        self.done = done

    def __str__(self) -> str:
        so_far = time.monotonic() - self.began
        left = time_left(so_far, self.done, self.total - self.done) if self.total else None
        if left is None:
            return f"{self.title}: {clock(so_far)} so far"
        return f"{self.title}: {100 * min(self.done, self.total) / self.total:.0f} %, {clock(left)} left"


def _show_working(state: Working, over: threading.Event) -> None:
    """Show work until it is over."""
    if over.wait(PATIENCE):
        return
    if console.live:
        with Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), console=console, transient=True,
                      refresh_per_second=5) as bar:  # fmt: skip
            line = bar.add_task(visible(str(state), lines=False), total=None)
            while not over.wait(0.2):
                bar.update(line, description=visible(str(state), lines=False))
        return
    console.print(f"{state.title} ...")
    between = BETWEEN
    while not over.wait(between):
        console.print(str(state))
        between = min(2 * between, MOST_BETWEEN)


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
            disable=not console.live or not console.shows_progress,
        )
        self.task = self.bar.add_task(visible(title, lines=False), total=total, completed=done, note="")

    def advance(self, done: int, numbers: Mapping[str, float]) -> None:
        """Show that `done` of `total` are finished."""
        self.done = done
        note = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.bar.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if console.live or not console.shows_progress:
            return
        if now - self.last_line >= self.between or done == self.total:
            self.last_line, self.between = now, min(2 * self.between, MOST_BETWEEN)
            left = time_left(now - self.began, done - self.first, self.total - done)
            rest = "" if left is None else f"  left {clock(left)}"
            console.print(f"{self.title} {done}/{self.total}  {note}{rest}")


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
        if size >= WORTH_SAYING and console.shows_progress:
            console.print(f"writing {visible(str(path), lines=False)}: {count_in(size, path.parent)}", markup=False)


def count_in(count: int, folder: Path) -> str:
    """Return `17.00 GiB, of 25.00 GiB that are free`."""
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    return f"{said_size(count)}, of {said_size(shutil.disk_usage(there).free)} that are free"
