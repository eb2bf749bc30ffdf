"""Checks before a training of what could fail late.

The checks cover the run's folder, the disk, the teacher and each student's files.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..atomic import temporary_beside
from ..backbones.base import Backbone
from ..backbones.conformance import conformance
from ..backbones.generate import device_of
from ..backbones.half_on_cpu import slow_half
from ..backbones.load import hub_id, pipeline_of
from ..backbones.parts import networks
from ..data.prompts import embedding_bytes
from ..data.trajectories import trajectory_bytes
from ..findings import Check, require
from ..report.words import size
from ..runs.place import place_checks, unwritable, writing_check
from ..runs.recipe import DistillRecipe, FinetuneRecipe
from ..runs.rehearsal import Trial, disk_check, student_check, trial_of
from ..runs.trajectory_sources import trajectory_times
from ..training.ledger import module_bytes
from ..training.saving import free_memory
from .finish import origin_of
from .preflight import in_first
from .progress import console, show_checks, working

KEPT = 3  # checkpoints at once: two are kept while the next is written
LOADED = 1.2  # memory that loading takes, relative to the weights


def look_before(
    stages: Sequence[DistillRecipe], teacher: Backbone, base_hash: str, prompts: Sequence[str], run: Path, place: Path
) -> None:
    """Check folder, disk, teacher and student files before a training.

    The first process checks; trial files are written to `place`. Images of the teacher and of the student
    are sampled only where sampling takes seconds.

    Raises ValueError with one line, in all processes.
    """

    def look() -> None:
        began, trials = time.monotonic(), [_trial(stage, teacher, base_hash) for stage in stages]
        disk = sum(trial.disk for trial in trials) + _data_bytes(stages, teacher, prompts)
        room = [*place_checks(run), writing_check(place), disk_check(disk, place)]
        with working("calling each network of the teacher"):
            found = conformance(teacher, prompts[0])
        mixed = any(stage.train.precision == "bf16" for stage in stages)
        if mixed and device_of(teacher.module).type == "cpu":
            said = slow_half(torch.bfloat16, "set train.precision=no")
            found += [Check("speed", said)] if said else []
        if all(check.holds for check in (*room, *found)):
            with working("writing and reading a trial student"):
                found += [student_check(trial, place / "trial") for trial in trials]
        _show([*room, *found], time.monotonic() - began)
        require(room, "--out")
        require(found, f"teacher: {stages[0].teacher}")

    in_first(look)


def look_before_finetune(recipe: FinetuneRecipe, teacher: Backbone, run: Path) -> None:
    """Check disk and teacher before a teacher is fine-tuned.

    Where all weights are trained, a checkpoint takes four times the bytes of the weights. A LoRA's
    checkpoint counts as nothing. Raises ValueError.
    """
    checkpoint = 0 if recipe.roles.lora else 4 * module_bytes(teacher.module)
    began, disk = time.monotonic(), disk_check(KEPT * checkpoint + module_bytes(*networks(pipeline_of(teacher))), run)
    found = conformance(teacher)
    _show([disk, *found], time.monotonic() - began)
    require([disk], "--out")
    require(found, f"teacher: {recipe.teacher}")


def _show(checks: Sequence[Check], seconds: float) -> None:
    """Print checks; with `--quiet` those that do not hold alone."""
    shown = [check for check in checks if console.shows_progress or not check.holds]
    if shown:
        console.print("before the training:")
        show_checks(shown)
        console.print(f"  {len(checks)} checks in {seconds:.1f} s")


def _data_bytes(stages: Sequence[DistillRecipe], teacher: Backbone, prompts: Sequence[str]) -> int:
    """Estimate the bytes of embeddings and trajectories in the run's folder."""
    walks = {
        trajectory_bytes(data.count, teacher.shape, len(trajectory_times(stage.method, teacher)), data.steps + 1)
        for stage in stages
        if (data := stage.data) is not None and data.source == "trajectories" and data.folder is None
    }
    return embedding_bytes(teacher, prompts) + sum(walks)


def _trial(recipe: DistillRecipe, teacher: Backbone, base_hash: str) -> Trial:
    return trial_of(teacher, recipe.method, recipe.roles, recipe.train, origin_of(recipe, base_hash, 0, 0.0))


def look_in_dry_run(
    stages: Sequence[DistillRecipe],
    load: Callable[[], tuple[Backbone, str]],
    hollow: Backbone,
    prompts: Sequence[str],
    run: Path,
) -> None:
    """Run the checks of `look_before` without a run.

    The teacher is loaded only where the weights are on this machine and fit in memory; otherwise one line
    says why nothing was checked. `hollow` is the teacher with fake (meta) tensors. No files are left behind.
    """
    teacher, room = stages[0].teacher, room_to_load(hollow)
    if hub_id(teacher):
        console.print(
            f"not looked at before the training: {teacher} is on the hub; a run downloads it, and looks at it then"
        )
    elif not room.holds:
        console.print(f"not looked at before the training: {room.said}; {room.cure}")
    else:
        place = temporary_beside(next(p for p in (run, *run.absolute().parents) if p.is_dir()) / "trial")
        try:
            place.mkdir()
            look_before(stages, *load(), prompts, run, place)
        except OSError as error:
            require([unwritable(run, error)], "--out")
        finally:
            shutil.rmtree(place, ignore_errors=True)


def room_to_load(hollow: Backbone) -> Check:
    """Check that this machine's memory holds the teacher.

    `hollow` is the teacher with fake (meta) tensors. Loading takes `LOADED` times the bytes of the weights.
    """
    needed = int(LOADED * module_bytes(*networks(pipeline_of(hollow))))
    free = free_memory()
    said = f"loading the teacher takes {size(needed)}, {size(free)} are free"
    return Check("memory", said, needed <= free, "run it where the training will run")
