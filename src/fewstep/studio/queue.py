"""The queue of one card: runs that wait until no other trains."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import write_json
from ..reading import json_in, reading
from ..typed import typed
from .commands import run_apart
from .folders import facts_of, find_runs

QUEUE = "studio-queue.json"
EVERY = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Job:
    """A run that waits: its folder, and the program that trains it."""

    run: str
    argv: tuple[str, ...]


def read_jobs(folder: Path) -> list[Job]:
    """Read what waits; nothing where the file is missing or damaged."""
    path = folder / QUEUE
    try:
        with reading(path, "delete it"):
            return list(typed(tuple[Job, ...], json_in(path)))
    except ValueError:
        return []


def added(jobs: Sequence[Job], job: Job) -> list[Job]:
    """Return the queue with a run at its end.

    A run that waits already is replaced.
    """
    return [*(j for j in jobs if j.run != job.run), job]


def removed(jobs: Sequence[Job], run: str) -> list[Job]:
    """Return the queue without a run."""
    return [j for j in jobs if j.run != run]


class Line:
    """The queue of a folder while the studio is open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock, self.closed = folder, threading.Lock(), threading.Event()
        self.said = ""  # why the last run of the queue could not be started

    def jobs(self) -> list[Job]:
        """Return what waits."""
        return read_jobs(self.folder)

    def busy(self) -> Path | None:
        """Return a run that trains now, None where none does."""
        return next((run for run in find_runs(self.folder) if facts_of(run).alive), None)

    def put(self, job: Job) -> Path | None:
        """Start a run, or let it wait.

        Returns the run that it waits for.
        """
        with self.lock:
            if (other := self.busy()) is None and not self.jobs():
                run_apart(job.argv, Path(job.run))
                return None
            self._write(added(self.jobs(), job))
            return other or Path(self.jobs()[0].run)

    def take_out(self, run: str) -> None:
        """Take a run out of the queue."""
        with self.lock:
            self._write(removed(self.jobs(), run))

    def step(self) -> None:
        """Start the first run that waits, if none trains."""
        with self.lock:
            waiting = self.jobs()
            if not waiting or self.busy() is not None:
                return
            self._write(waiting[1:])
            try:
                run_apart(waiting[0].argv, Path(waiting[0].run))
                self.said = ""
            except OSError as error:
                self.said = f"{waiting[0].run} could not be started ({error.strerror}); the queue goes on"

    def watch(self) -> None:
        """Look at the queue until the studio is closed."""
        while not self.closed.wait(EVERY):
            self.step()

    def _write(self, jobs: Sequence[Job]) -> None:
        write_json(self.folder / QUEUE, [asdict(job) for job in jobs])
