"""The trajectories that a run learns from: the teacher's, or a finished student's, walked once and shared through a folder."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..backbones.base import Backbone, Cond
from ..backbones.generate import device_of
from ..core import solvers
from ..core.solvers import State, solver_named
from ..export.card import card_evaluations
from ..hashes import sha256_of
from ..methods.method import Method
from ..training.paths import OF_STUDENT, TRAJECTORIES, Paths, PathsConfig, Walker, guided_teacher, stops, teacher_paths, to_end, union
from ..training.prompts import Embeddings
from .sampling import student_grid
from .students import load_student

PATIENCE = 10.0  # seconds between two lines of progress


def walked_paths(teacher: Backbone, method: Method, data: Embeddings, ways: PathsConfig, run: Path | None, identity: str) -> Paths:
    """The teacher's trajectories, or a student's, those in their folder not walked again; says before it begins what they cost."""
    times = path_times(method, teacher)
    own = None if run is None else run / (OF_STUDENT if ways.student else TRAJECTORIES)
    place = own if ways.folder is None else Path(ways.folder)
    if ways.student:
        walker = student_walker(teacher, ways.student, times)
    else:
        null = data.unconditional(device_of(teacher.module))
        walker = guided_teacher(teacher, null, ways, times, method.guidance, method.guidance_parallel)
    walking = teacher_paths(teacher, data, ways, times, method.guidance, place, identity, parallel=method.guidance_parallel, walker=walker)
    return to_end(walking, told_walking(ways, walker.calls, place))


def told_walking(ways: PathsConfig, calls: int, place: Path | None) -> Callable[[int], None]:
    """Say on the standard error what walking costs; the function returned says from time to time how far it has come."""
    who = "the teacher" if ways.student is None else f"the student in {ways.student}"
    kept = (
        f"those in {place} are not walked again"
        if place is not None
        else "they are not kept: paths=PathsConfig(folder=...) or out keeps them"
    )
    _say(
        f"trajectories: {ways.count:,} of {calls} network calls of {who}, {ways.count * calls:,} in all; {kept}; PathsConfig(count=...) takes fewer"
    )
    began = last = time.monotonic()

    def seen(done: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PATIENCE:
            last = now
            _say(f"trajectories: {done:,} of {ways.count:,}, {(now - began) / done * (ways.count - done):.0f} s left")

    return seen


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def path_times(method: Method, backbone: Backbone) -> Tensor:
    """All times at which a student of this method wants to know where the teacher is."""
    return union(backbone.schedule, [method.times(backbone.schedule, k) for k in method.counts])


def student_walker(teacher: Backbone, folder: str | Path, times: Tensor) -> Walker:
    """A finished student of this teacher, on its way in its default number of steps. Raises ValueError where that does not stop at all `times`, or is at random."""
    folder, (loaded, schedule) = Path(folder), (load_student(folder, teacher), teacher.schedule)
    card, student, count = loaded.card, loaded.student, loaded.card.steps[0]
    grid, solver = student_grid(card, teacher, count), card.solver[str(count)]
    if solver == "renoise":
        raise ValueError(
            f"data.student: {folder} adds new noise at every step, which leaves nothing to follow; choose a student of another solver"
        )
    places = stops(grid, times)
    if places is None:
        visits, asked = (", ".join(f"{t:.4g}" for t in of.tolist()) for of in (grid, times))
        raise ValueError(
            f"data.student: {folder} stops at {visits}, this one at {asked}; set method.steps and method.shift so that these are among those"
        )

    def states(cond: Cond, x: Tensor) -> list[State]:
        return list(solvers.sample(student.denoise(cond, card.told[0]), schedule, x, grid, solver_named(solver), student.head))

    about = {"student": sha256_of(*sorted(folder.rglob("*.safetensors"))), "solver": solver, "free_first": card.free_first}
    return Walker(grid, places, card_evaluations(card, count), about, states)
