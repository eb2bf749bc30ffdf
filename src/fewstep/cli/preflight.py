"""Checks before a run of what would end it hours later."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..atomic import remove_left, require_replaceable
from ..backbones.load import bundled, source_of
from ..data.trajectories import OF_STUDENT, TRAJECTORIES
from ..findings import require
from ..names import visible
from ..processes import any_rank, is_first
from ..runs.place import unwritable, writing_check
from ..training.lock import locked
from .faults import logged_in
from .progress import console

# Folders in which a run writes files.
PARTS = ("warm_start", "samples", "embeddings", "evaluation", TRAJECTORIES, OF_STUDENT)


def require_output(path: Path, option: str) -> None:
    """Check that a file can be written to `path`.

    Raises ValueError before hours go into what would be written.
    """
    if path.name == "-":
        raise ValueError(f"{option}: got -, what is made goes to a file; pass its name")
    require_parent(path, option)
    require_replaceable(path, option)


def require_parent(path: Path, option: str) -> None:
    """Check that something can be made at `path`.

    Raises ValueError where the folder above is no folder or may not be written to, and where the name is too
    long.
    """
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    shown, cause = visible(str(above), lines=False), ""
    if not above.is_dir():
        cause = f"{shown} is no folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        cause = f"{shown} may not be written to"
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        cause = cause or str(error.strerror).lower()
    if cause:
        raise ValueError(f"{option}: got {visible(str(path), lines=False)}, {cause}; choose another")


def note_shadowed(teacher: str) -> None:
    """Print a note where a folder has a bundled teacher's name.

    The name stands for the bundled teacher.
    """
    place = source_of(teacher).place
    if place in bundled() and (Path(place) / "model_index.json").is_file():
        console.print(f"note: teacher {place} is the one that ships with fewstep; pass ./{place} for the folder here")


def note_guidance(scale: float) -> None:
    """Print a note where guidance turns a student from its prompts."""
    if scale < 1:
        console.print(
            f"note: method.guidance is {scale:g}; below 1 the teacher turns from its prompts, 1 is without guidance"
        )


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a run's folder for all processes of the run.

    Half-written files of earlier runs are removed first. Raises ValueError in all processes where the first
    process cannot hold the folder.
    """
    with ExitStack() as stack:

        def hold() -> None:
            try:
                stack.enter_context(locked(run))
                for part in (run, *(run / name for name in PARTS)):
                    remove_left(part, below=part is not run)
            except OSError as error:
                require([unwritable(run, error)], "--out")
            require([writing_check(run)], "--out")

        in_first(hold)
        with logged_in(run):
            yield


def in_first(work: Callable[[], None]) -> None:
    """Call `work` in the first process alone.

    Raises ValueError in all processes where `work` does in the first.
    """
    refused: ValueError | None = None
    try:
        if is_first():
            work()
    except ValueError as error:
        refused = error
    if any_rank(refused is not None):
        raise refused or ValueError("see what the first process said")
