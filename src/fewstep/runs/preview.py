"""The run's fixed prompts and seeds as pictures: while it trains, and for its report."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.base import Backbone, calls, guided
from ..backbones.base import rows as rows_of
from ..backbones.generate import device_of, in_parts, pictures, trajectory
from ..core import timegrid
from ..core.solvers import Denoise, State, evaluations
from ..methods.method import Method, student_of
from ..report.grids import write_grid
from ..report.pictures import Pictures, StepGrid, Trajectory
from ..report.video import strip
from ..report.words import plural
from ..roles.roles import Roles
from ..training.monitor import drift, look
from ..training.prompts import Embeddings


@dataclass(frozen=True)
class Drawing:
    """What a run draws over and over: the method's student, `batch` pictures at once, beside a teacher of `teacher_steps`, from `seed` on."""

    method: Method
    batch: int
    teacher_steps: int = 50
    seed: int = 0


class Preview:
    """The run's fixed pictures: the teacher's row once, the student's row every time. Without a run they are drawn and not written."""

    def __init__(self, drawing: Drawing, teacher: Backbone, shown: Embeddings, run: Path | None) -> None:
        self.drawing, self.teacher, self.folder = drawing, teacher, None if run is None else run / "samples"
        self.prompts = shown.prompts
        self.seeds = [drawing.seed + i for i in range(len(self.prompts))]
        device = device_of(teacher.module)
        self.cond, self.null = shown.all(device), shown.unconditional(device)
        times = timegrid.uniform(teacher.schedule, drawing.teacher_steps)
        self.reference = strip(pictures(teacher, self._guided(drawing.method.guidance), self.seeds, times))

    def _guided(self, scale: float) -> Denoise:
        """The teacher, as many pictures at once as in training, whose memory is enough for it."""
        teacher = self.teacher
        return in_parts(lambda r: guided(teacher, teacher.module, rows_of(self.cond, r), self.null, scale), self.drawing.batch)

    def _told(self, roles: Roles, method: Method, count: int) -> Denoise:
        """The student of this count, likewise."""
        return in_parts(lambda r: student_of(method, roles, rows_of(self.cond, r), count), self.drawing.batch)

    def show(self, roles: Roles, iteration: int, method: Method) -> list[str]:
        """Write `samples/step_N.png`; returns the monitor's warnings."""
        with roles.averaged():
            rows = [self._student(roles, method, k)[-1].x for k in method.counts]
        own = [strip(self.teacher.decode(x)) for x in rows]
        labels = [f"teacher, {self.drawing.teacher_steps} steps", *(f"student, {plural(k, 'step')}" for k in method.counts)]
        if self.folder is not None:
            write_grid(self.folder / f"step_{iteration:06d}.png", torch.stack([self.reference, *own]), labels, self.prompts)
        return drift(look(own[0]), look(self.reference)) if iteration else []

    def _student(self, roles: Roles, method: Method, steps: int) -> list[State]:
        times = method.times(self.teacher.schedule, steps)
        return trajectory(self.teacher, self._told(roles, method, steps), self.seeds, times, method.solver, roles.head)

    def compare(self, roles: Roles, method: Method) -> Pictures:
        """The report's pictures: teacher guided, then teacher at the student's cost and student for every step count; both trajectories."""
        teacher, most = self.teacher, self.drawing.teacher_steps
        each = calls(self.null, method.guidance)
        rows = {labelled("teacher", "guided step" if each > 1 else "step", most, evaluations(most, each)): self.reference}
        paths, shown = {}, min(4, len(self.prompts))
        for steps in method.counts:
            times = method.times(teacher.schedule, steps)
            few = trajectory(teacher, self._guided(1.0), self.seeds, times)
            for who, states in (("teacher", few), ("student", self._student(roles, method, steps))):
                name = labelled(who, "step", steps)
                cost = evaluations(steps, free=method.free_first and who == "student")
                rows[labelled(who, "step", steps, cost)] = strip(teacher.decode(states[-1].x))
                if steps == max(method.counts):
                    clean = [strip(teacher.decode(s.x0[:shown]), 1) for s in states[1:] if s.x0 is not None]
                    paths[name] = Trajectory(times[:-1].tolist(), torch.stack(clean, 1))
        return Pictures(
            self.prompts, rows, paths, self._step_grid(roles, method, shown) if roles.counts and method.tells == "steps" else None
        )

    def _step_grid(self, roles: Roles, method: Method, shown: int) -> StepGrid:
        """A student of several step counts, told each and taking each."""
        counts = sorted(method.counts)

        def draw(told: int, taken: int) -> Tensor:
            times = method.times(self.teacher.schedule, taken)
            return strip(pictures(self.teacher, self._told(roles, method, told), self.seeds[:shown], times, method.solver, roles.head), 1)

        images = torch.stack([torch.stack([draw(told, taken) for taken in counts], 1) for told in counts], 1)
        return StepGrid(counts, counts, images)


def labelled(who: str, step: str, steps: int, cost: int | None = None) -> str:
    """`student, 4 steps (3 evaluations)`, as `report.pictures.Pictures` wants its labels."""
    name = f"{who}, {plural(steps, step)}"
    return name if cost is None else f"{name} ({plural(cost, 'evaluation')})"
