"""The run's fixed prompts and seeds as pictures: while it trains, and for its report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.base import Backbone, guided, nfe_per_step
from ..backbones.base import rows as rows_of
from ..backbones.generate import device_of, in_parts, pictures, trajectory
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.solvers import Denoise, State, total_nfe
from ..data.prompts import Embeddings
from ..evaluation.distances import paired_distance
from ..evaluation.features import feature_network, features
from ..evaluation.motion import motion
from ..methods.distribution_matching import DistributionMatching, draw
from ..methods.method import Method, student_of
from ..report.grids import write_grid
from ..report.pictures import Pictures, StepGrid, Trajectory
from ..report.video import strip
from ..report.words import plural
from ..roles.roles import Roles
from ..tensors import finite
from ..training.monitor import MODERATE, ImageStats, drift, look, unfit


@dataclass(frozen=True)
class Drawing:
    """What a run draws over and over: the method's student, `batch` pictures at once, beside a teacher of `teacher_steps`, from `seed` on."""

    method: Method
    batch: int
    teacher_steps: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Shown:
    """What a preview says: the monitor's `warnings`, and of every step count how far its pictures are from the teacher's.

    The distance is that of EfficientNet-lite0 features, prompt by prompt, relative to the teacher's own (`paired_distance`); the teacher
    is guided as in training, but no more than moderately.
    """

    warnings: list[str]
    distances: Mapping[int, float]

    @property
    def distance(self) -> float:
        """The mean over step counts."""
        return sum(self.distances.values()) / len(self.distances)


class Preview:
    """The run's fixed pictures: the teacher's row once, the student's row every time. Without a run they are drawn and not written."""

    def __init__(self, drawing: Drawing, teacher: Backbone, shown: Embeddings, run: Path | None) -> None:
        self.drawing, self.teacher, self.folder = drawing, teacher, None if run is None else run / "samples"
        self.prompts = shown.prompts
        self.seeds = [drawing.seed + i for i in range(len(self.prompts))]
        device = device_of(teacher.module)
        self.cond, self.null = shown.all(device), shown.unconditional(device)
        times, guidance = timegrid.uniform(teacher.schedule, drawing.teacher_steps), drawing.method.guidance
        self.reference, self.look = self._looked(trajectory(teacher, self._guided(guidance), self.seeds, times)[-1].x)
        self.moderate, seen = None, self.reference
        if self.null and guidance.scale > MODERATE:
            moderate = self._guided(replace(guidance, scale=MODERATE))
            seen, self.moderate = self._looked(trajectory(teacher, moderate, self.seeds, times)[-1].x)
        self.features, self.seen = feature_network(), seen
        self.starts = {k: self._start(drawing.method, k) for k in drawing.method.counts}

    def _looked(self, x: Tensor) -> tuple[Tensor, ImageStats]:
        """The pictures that states are decoded to, clips as strips of frames, and their statistics."""
        decoded = self.teacher.decode(x)
        return strip(decoded), look(decoded, x, motion(decoded) / 255 if decoded.ndim == 5 else None)

    def _start(self, method: Method, count: int) -> ImageStats:
        """The teacher's own steps without guidance, which is what a student begins as."""
        states = trajectory(
            self.teacher,
            self._guided(Guidance()),
            self.seeds,
            method.times(self.teacher.schedule, count),
            method.solver,
        )
        return self._looked(states[-1].x)[1]

    def _guided(self, guidance: Guidance) -> Denoise:
        """The teacher, as many pictures at once as in training, whose memory is enough for it."""
        teacher = self.teacher
        return in_parts(
            lambda r: guided(teacher, teacher.module, rows_of(self.cond, r), self.null, guidance), self.drawing.batch
        )

    def _told(self, roles: Roles, method: Method, count: int) -> Denoise:
        """The student of this count, likewise."""
        return in_parts(lambda r: student_of(method, roles, rows_of(self.cond, r), count), self.drawing.batch)

    def show(self, roles: Roles, iteration: int, method: Method) -> Shown:
        """Write `samples/step_N.png` and judge what is on it. Before the first iteration the teacher is judged, not the student."""
        with roles.averaged():
            own = {k: self._looked(self._student(roles, method, k)[-1].x) for k in method.counts}
        rows = {f"teacher, {self.drawing.teacher_steps} steps": self.reference}
        rows |= {f"student, {plural(k, 'step')}": images for k, (images, _) in own.items()}
        if isinstance(method, DistributionMatching):
            rows |= self._compared(roles, method)
        if self.folder is not None:
            write_grid(
                self.folder / f"step_{iteration:06d}.png", torch.stack(list(rows.values())), list(rows), self.prompts
            )
        goal = self.seen.cpu()
        distances = {k: self._distance(images.cpu(), goal) for k, (images, _) in own.items()}
        if not iteration:
            return Shown(unfit(self.look, self.moderate, method.guidance.scale), distances)
        return Shown([line for k, (_, seen) in own.items() for line in self._left(seen, k)], distances)

    def _distance(self, images: Tensor, goal: Tensor) -> float:
        """See `paired_distance`; NaN where either are not finite, which a run goes on to say."""
        if not (finite(images) and finite(goal)):
            return math.nan
        return paired_distance(features(self.features, images), features(self.features, goal))

    def _left(self, seen: ImageStats, count: int) -> list[str]:
        """In what the student of this count has left its teacher, or the teacher under moderate guidance; each thing is said once."""
        where, start = f" in {plural(count, 'step')}", self.starts[count]
        found = drift(seen, self.look, start, where=where)
        if self.moderate is not None:
            said = {line.split()[1] for line in found}
            more = drift(seen, self.moderate, start, f"the teacher's at guidance {MODERATE:g}", where)
            found += [line for line in more if line.split()[1] not in said]
        return found

    def _compared(self, roles: Roles, method: DistributionMatching) -> dict[str, Tensor]:
        """What student, teacher and fake score take for the clean picture where they are compared, at a state drawn as in training.

        The fake score should say what the student does; where it and the teacher differ is where the student is pushed.
        """
        count, size, device = method.counts[0], self.drawing.batch, device_of(self.teacher.module)
        found: list[list[Tensor]] = []
        with torch.no_grad():
            for first in range(0, len(self.seeds), size):
                part = slice(first, min(first + size, len(self.seeds)))
                cond, rng = rows_of(self.cond, part), torch.Generator(device).manual_seed(self.seeds[first])
                d = draw(method, roles, cond, len(self.seeds[part]), rng, with_gradient=False, steps=count)
                guide = roles.teacher(cond, self.null, method.guidance)
                fake = roles.denoise("fake", cond, count)
                found.append([d.x0, guide(d.x_tau, d.tau).x0, fake(d.x_tau, d.tau).x0])
        who = ("student", "teacher", "fake score")
        return {
            f"estimate of the {name}": strip(self.teacher.decode(torch.cat(parts)))
            for name, parts in zip(who, zip(*found, strict=True), strict=True)
        }

    def _student(self, roles: Roles, method: Method, steps: int) -> list[State]:
        times = method.times(self.teacher.schedule, steps)
        return trajectory(self.teacher, self._told(roles, method, steps), self.seeds, times, method.solver, roles.head)

    def compare(self, roles: Roles, method: Method) -> Pictures:
        """The report's pictures: teacher guided, then teacher at the student's cost and student for every step count; both trajectories.

        Where a guided step costs two calls, the teacher has the default student's calls in either way: unguided, and half as many guided.
        """
        teacher, most = self.teacher, self.drawing.teacher_steps
        each = nfe_per_step(self.null, method.guidance)
        guide, plain = ("guided step", "unguided step") if each > 1 else ("step", "step")
        rows = {labelled("teacher", guide, most, total_nfe(most, each)): self.reference}
        cost = total_nfe(method.counts[0], analytic=method.analytic_first_step)
        if each > 1 and cost and cost % each == 0:
            times = timegrid.uniform(teacher.schedule, cost // each)
            half = trajectory(teacher, self._guided(method.guidance), self.seeds, times)
            rows[labelled("teacher", guide, cost // each, cost)] = strip(teacher.decode(half[-1].x))
        paths, shown = {}, min(4, len(self.prompts))
        for steps in method.counts:
            times = method.times(teacher.schedule, steps)
            few = trajectory(teacher, self._guided(Guidance()), self.seeds, times)
            for who, states in (("teacher", few), ("student", self._student(roles, method, steps))):
                name = labelled(who, "step", steps)
                cost = total_nfe(steps, analytic=method.analytic_first_step and who == "student")
                rows[labelled(who, plain if who == "teacher" else "step", steps, cost)] = strip(
                    teacher.decode(states[-1].x)
                )
                if steps == max(method.counts):
                    clean = [strip(teacher.decode(s.x0[:shown]), 1) for s in states[1:] if s.x0 is not None]
                    paths[name] = Trajectory(times[:-1].tolist(), torch.stack(clean, 1))
        return Pictures(
            self.prompts,
            rows,
            paths,
            self._step_grid(roles, method, shown)
            if roles.condition_values and method.condition_on == "steps"
            else None,
        )

    def _step_grid(self, roles: Roles, method: Method, shown: int) -> StepGrid:
        """A student of several step counts, told each and taking each."""
        counts = sorted(method.counts)

        def sampled(told: int, taken: int) -> Tensor:
            times = method.times(self.teacher.schedule, taken)
            return strip(
                pictures(
                    self.teacher, self._told(roles, method, told), self.seeds[:shown], times, method.solver, roles.head
                ),
                1,
            )

        images = torch.stack([torch.stack([sampled(told, taken) for taken in counts], 1) for told in counts], 1)
        return StepGrid(counts, counts, images)


def labelled(who: str, step: str, steps: int, cost: int | None = None) -> str:
    """`student, 4 steps (3 evaluations)`, as `report.pictures.Pictures` wants its labels."""
    name = f"{who}, {plural(steps, step)}"
    return name if cost is None else f"{name} ({plural(cost, 'evaluation')})"
