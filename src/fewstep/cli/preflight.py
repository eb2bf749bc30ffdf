"""Checks before a run of what would end it hours later."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..atomic import cure_of, link_or_copy, remove_left, require_replaceable, temporary_beside
from ..backbones.load import bundled, source_of
from ..data.trajectories import OF_STUDENT, TRAJECTORIES
from ..findings import Check, require
from ..names import LONGEST, visible
from ..processes import any_rank, is_first
from ..student.folder import FILE as CARD_FILE
from ..student.folder import holds_student
from ..training.lock import locked
from .faults import logged_in
from .progress import console

FINAL = "final"
# Folders in which a run writes files.
PARTS = ("warm_start", "samples", "embeddings", "evaluation", TRAJECTORIES, OF_STUDENT)
# As deep and as long as the paths that a run writes.
DEEPEST = ("unet", f"{'x' * (LONGEST + len('-kohya.safetensors') - 18)}-kohya.safetensors")


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


def place_checks(run: Path) -> list[Check]:
    """Check whether a run may have this folder.

    Nothing is written.
    """
    shown, real = visible(str(run), lines=False), Path(os.path.realpath(run))
    own = real in (Path(real.anchor), Path(os.path.realpath(Path.home())))
    foreign = next((name for name in (CARD_FILE, "model_index.json") if (run / name).exists()), "")
    blocked = next((p for p in (run, *run.parents) if p.exists() and not p.is_dir()), None)
    within = next((p for p in real.parents if holds_student(p) or (p / "state.json").is_file()), None)
    student = next((f for f in (run / FINAL, run / "warm_start" / FINAL) if _somebodys(f)), None)
    found = [
        (
            own,
            f"{shown} is no folder for one run",
            f"pass one inside it, e.g. --out {visible(str(real / 'runs' / 'mine'), lines=False)}",
        ),
        (
            blocked is not None,
            f"{visible(str(blocked), lines=False)} is a file or a device, a run needs a folder",
            "choose another",
        ),
        (
            within is not None,
            f"{visible(str(within), lines=False)} is a student or a checkpoint, no place for a run",
            "choose another",
        ),
        (bool(foreign), f"{shown} is a model's own folder (it has {foreign} in it)", "choose another"),
        (
            student is not None,
            f"{visible(str(student), lines=False)} is there and no student of fewstep's",
            "move it away, or choose another --out",
        ),
    ]
    return [Check("folder", said, False, cure) for wrong, said, cure in found if wrong] or [
        Check("folder", f"{shown} is for this run")
    ]


def _somebodys(folder: Path) -> bool:
    """Return whether a finished student would replace anything but a student."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return True
    return folder.is_dir() and not holds_student(folder) and any(folder.iterdir())


def writing_check(run: Path) -> Check:
    """Check that a run can write to its folder.

    Writes names as deep and as long as the run will, gives a file a second name, and renames a folder.
    Nothing is left behind.
    """
    trial = temporary_beside(run / "trial")
    try:
        deepest = trial.joinpath(*DEEPEST)
        deepest.parent.mkdir(parents=True)
        deepest.write_bytes(b"x")
        link_or_copy(deepest, deepest.with_name("second"))
        os.replace(trial, renamed := temporary_beside(run / "trial"))
        trial = renamed
    except OSError as error:
        return unwritable(run, error)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return Check("writing", "long names, second names of files, and renamed folders")


def unwritable(run: Path, error: OSError) -> Check:
    """Return the failed check of a folder that cannot be written."""
    return Check(
        "writing",
        f"cannot write to {visible(str(run), lines=False)} ({error.strerror or error})",
        False,
        cure_of(error),
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
