"""Checks of the folder in which a run writes."""

import os
import shutil
from pathlib import Path

from ..atomic import cure_of, link_or_copy, temporary_beside
from ..findings import Check
from ..names import LONGEST, visible
from ..student.folder import holds_student

FINAL = "final"
# As deep and as long as the paths that a run writes.
DEEPEST = ("unet", f"{'x' * (LONGEST + len('-kohya.safetensors') - 18)}-kohya.safetensors")


def place_checks(run: Path) -> list[Check]:
    """Check whether a run may have this folder.

    Nothing is written.
    """
    try:
        return _place_checks(run)
    except OSError as error:  # a name too long, a folder of somebody else
        return [unwritable(run, error)]


def _place_checks(run: Path) -> list[Check]:
    """Check whether a run may have a folder that can be read."""
    shown, real = visible(str(run), lines=False), Path(os.path.realpath(run))
    own = real in (Path(real.anchor), Path(os.path.realpath(Path.home())))
    pipeline = "a model_index.json" if (run / "model_index.json").exists() else ""
    foreign = "a student's card" if holds_student(run) else pipeline
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
