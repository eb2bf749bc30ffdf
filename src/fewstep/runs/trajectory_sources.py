"""Times of trajectories, and a finished student as their source."""

from pathlib import Path

from torch import Tensor

from ..backbones.base import Backbone, Cond
from ..core import solvers
from ..core.solvers import State, solver_named
from ..data.trajectories import TrajectorySource, stops, union
from ..hashes import sha256_of
from ..methods.method import Method
from ..student.card import card_nfe
from ..student.folder import require_folder
from ..student.student import Student


def trajectory_times(method: Method, backbone: Backbone) -> Tensor:
    """Return all times at which a method needs the teacher's state.

    The times are those of all the method's step counts together.
    """
    return union(backbone.schedule, [method.times(backbone.schedule, k) for k in method.counts])


def student_source(teacher: Backbone, folder: str | Path, times: Tensor) -> TrajectorySource:
    """Return a trajectory source that samples from a finished student.

    Raises ValueError if the student's time grid misses any of `times`, or if the student's solver is
    stochastic.
    """
    student, schedule = Student.read(folder, teacher), teacher.schedule
    card, count = student.card, student.card.steps[0]
    grid, solver = student.times(count), solver_named(student.solver(count))
    if solver.stochastic:
        raise ValueError(
            f"data.from_student: {folder} adds new noise at every step, which leaves nothing to follow; "
            "choose a student of another solver"
        )
    places = stops(grid, times)
    if places is None:
        visits, asked = (", ".join(f"{t:.4g}" for t in of.tolist()) for of in (grid, times))
        raise ValueError(
            f"data.from_student: {folder} stops at {visits}, this one at {asked}; "
            "set method.steps and method.shift so that these are among those"
        )

    def states(cond: Cond, x: Tensor) -> list[State]:
        return list(solvers.sample(student.denoise(cond), schedule, x, grid, solver, student.head))

    weights = sha256_of(*sorted(require_folder(folder, "data.from_student").rglob("*.safetensors")))
    about = {"student": weights, "solver": solver.name, "analytic_first_step": card.analytic_first_step}
    return TrajectorySource(grid, places, card_nfe(card, count), about, states)
