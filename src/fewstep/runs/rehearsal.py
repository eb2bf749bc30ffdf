"""A trial of a student's files before the training.

An untrained student is written, read again and sampled from. The disk space that a run takes is checked,
too.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..atomic import temporary_beside
from ..backbones.apart import apart
from ..backbones.base import Backbone
from ..backbones.conformance import operations_of, small
from ..backbones.generate import device_of
from ..backbones.modules import dtype_of
from ..findings import Check
from ..methods.method import Method
from ..reading import reason
from ..report.words import size
from ..roles.roles import SURROGATE, TRAINED, Roles, RolesConfig
from ..student.folder import Parts
from ..student.student import Origin, Student, size_of, student_card
from ..training.ledger import module_bytes, storage_bytes
from ..training.loop import TrainConfig
from ..training.saving import checkpoint_bytes
from .init import roles_for
from .sampling import sample

STUDENTS = 3  # at once: the last, the best, and a new one that replaces either
# Standard deviation of a trial's weights. Small, so that the trial student samples like the teacher; not zero,
# so that the files differ from the teacher.
CHANGE = 1e-2
SAME, ROUNDED = 1e-3, 0.05  # largest difference of a pixel in single and in half precision
LARGE = 2e12  # operations, some seconds on a CPU


@dataclass(frozen=True)
class Trial:
    """An untrained student, and the bytes that its run leaves."""

    student: Student
    disk: int


def trial_of(teacher: Backbone, method: Method, networks: RolesConfig, config: TrainConfig, origin: Origin) -> Trial:
    """Return the student of a run before training, changed a little.

    A U-Net on a CPU gets small images. Where full copies of the network are trained, no copies are made for
    the trial.
    """
    teacher, full = small(teacher), not networks.lora
    roles = roles_for(
        apart(teacher), method, replace(networks, lora=True, rank=1, alpha=None) if full else networks, config.seed
    )
    rng = torch.Generator().manual_seed(config.seed)
    lora, *later = [
        {n: torch.randn(v.shape, generator=rng).to(v) * CHANGE for n, v in roles.student_state(k).items()}
        for k in range(len(roles.step_names))
    ]
    vectors = {k: torch.randn(v.shape, generator=rng) * CHANGE for k, v in roles.vectors().items()}
    card = student_card(roles, method, replace(origin, size=size_of(teacher)))  # of the small images
    card = replace(card, weights="full", rank=None, alpha=None) if full else card
    # A LoRA is written under two names.
    weights, sets = module_bytes(teacher.module) if full else 2 * storage_bytes(*lora.values()), 1 + len(later)
    disk = (config.keep + 1) * _checkpoint(roles, config, weights if full else 0) + STUDENTS * sets * weights
    each = [Parts(card, own) for own in later]
    return Trial(Student.from_parts(Parts(card, lora, {}, None, vectors, roles.head, each), teacher), disk)


def _checkpoint(roles: Roles, config: TrainConfig, copy: int) -> int:
    """Return the bytes of a checkpoint.

    A checkpoint holds what is trained, the optimiser's state and the student's average. `copy` is the bytes
    of a network where full copies are trained, else 0.
    """
    if copy:
        moments, sets = 0.5 if config.optimizer == "adamw8bit" else 2, len(roles.step_names)
        trained = sum(role in roles.trained for role in (*TRAINED, SURROGATE)) + sets - 1
        return int(copy * (sets + trained * (1 + moments)))
    return checkpoint_bytes(roles, config.optimizer)


def student_check(trial: Trial, folder: Path) -> Check:
    """Check a trial student: write, read again, sample and compare.

    The files lie next to `folder` and are removed afterwards. The samples of both students differ by
    rounding alone. Where a call takes long, the files are written and read, and nothing is sampled.
    """
    student, place, steps = trial.student, temporary_beside(folder), trial.student.card.steps[0]
    teacher = student.backbone
    half = dtype_of(teacher.module).itemsize < 4
    try:
        student.write(place)
        again = Student.read(place, student.base)
        if device_of(teacher.module).type == "cpu" and 2 * steps * operations_of(teacher, teacher.shape) > LARGE:
            return Check(
                "student", "its files are written and read; drawing with them takes long on a CPU and is left out"
            )
        wanted, found = (sample(s, [""], steps=steps) for s in (student, again))
    except OSError as error:  # e.g. a full disk, no fault of the recipe
        raise ValueError(f"--out: {error}") from error
    except (ValueError, FloatingPointError) as error:
        return Check(
            "student",
            f"its files cannot be written, read and sampled ({reason(error)})",
            False,
            "please report it with the recipe",
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    apart_by = float((found - wanted).abs().max())
    same = apart_by <= (ROUNDED if half else SAME)  # False for NaN
    said = f"its files are written, read and sampled in {steps} steps: largest difference {apart_by:.1e}"
    return Check("student", said, same, "" if same else "they do not hold all of it: please report it with the recipe")


def disk_check(disk: int, folder: Path) -> Check:
    """Check that the disk has room for what a run leaves."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    said = f"{size(disk)} for what a run keeps, {size(free)} are free"
    return Check("disk", said, disk <= free, "" if disk <= free else "free some space, or choose another folder")
