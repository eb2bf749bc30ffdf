"""The run's fixed prompts and seeds as images.

Previews are sampled during the training, and once for the report.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import write_bytes
from ..backbones.base import Backbone, guided, nfe_per_step
from ..backbones.base import rows as rows_of
from ..backbones.generate import device_of, in_parts, sample_images, trajectory
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.prediction import Split
from ..core.rollout import DenoiseRows
from ..core.solvers import Denoise, State, total_nfe
from ..data.prompts import Embeddings
from ..evaluation.distances import paired_distance
from ..evaluation.features import feature_network, features
from ..evaluation.motion import motion
from ..methods.distribution_matching import DistributionMatching, draw
from ..methods.method import Method, student_of
from ..notebook import in_notebook
from ..report.grids import draw_grid
from ..report.images import Images, StepGrid, Trajectory, png
from ..report.video import strip
from ..report.words import plural
from ..roles.roles import Roles
from ..student.folder import SAMPLES, preview_file
from ..tensors import finite
from ..training.monitor import MODERATE, ImageStats, drift, look, unfit
from ..training.precision import Precision, computing


@dataclass(frozen=True)
class Drawing:
    """What a run samples over and over.

    The method's student, `batch` images at once, next to a teacher of `teacher_steps` steps. Seeds count up
    from `seed`. Both networks compute in the training's `precision`.
    """

    method: Method
    batch: int
    teacher_steps: int = 50
    seed: int = 0
    precision: Precision = "no"


@dataclass(frozen=True)
class Shown:
    """What a preview says: warnings, and distances to the teacher.

    `warnings` are the monitor's. `distances` has, for every step count, the distance of the student's images
    to the teacher's: that of EfficientNet-lite0 features, prompt by prompt, relative to the norm of the
    teacher's features (`paired_distance`). The teacher is guided as in training, but no more than
    moderately.
    """

    warnings: list[str]
    distances: Mapping[int, float]

    @property
    def distance(self) -> float:
        """The mean distance over step counts."""
        return sum(self.distances.values()) / len(self.distances)


class Preview:
    """The run's fixed images.

    The teacher's row is sampled once, the student's rows at every preview. Without a run the images are not
    written.
    """

    def __init__(self, drawing: Drawing, teacher: Backbone, shown: Embeddings, run: Path | None) -> None:
        self.drawing, self.teacher, self.folder = drawing, teacher, None if run is None else run / SAMPLES
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
        self.image: Path | bytes | None = None  # the grid that `show` made last, a PNG

    def _looked(self, x: Tensor) -> tuple[Tensor, ImageStats]:
        """Decode states to images, and compute statistics of the images.

        Videos become strips of frames.
        """
        decoded = self.teacher.decode(x)
        return strip(decoded), look(decoded, x, motion(decoded) / 255 if decoded.ndim == 5 else None)

    def _start(self, method: Method, count: int) -> ImageStats:
        """Return statistics of the teacher's own unguided steps.

        A student is initialized from the teacher, so these are the statistics of the initial student.
        """
        states = trajectory(
            self.teacher,
            self._guided(Guidance()),
            self.seeds,
            method.times(self.teacher.schedule, count),
            method.sampler,
        )
        return self._looked(states[-1].x)[1]

    def _guided(self, guidance: Guidance) -> Denoise:
        """Return the guided teacher, evaluated in parts.

        A part is as large as the training's batch, for which the memory is enough.
        """
        teacher = self.teacher
        return self._in_parts(lambda r: guided(teacher, teacher.module, rows_of(self.cond, r), self.null, guidance))

    def _conditioned(self, roles: Roles, method: Method, count: int) -> Denoise:
        """Return the student of this step count, evaluated in parts.

        A part is as large as the training's batch.
        """
        return self._in_parts(lambda r: student_of(method, roles, rows_of(self.cond, r), count), roles)

    def _in_parts(self, denoise_rows: DenoiseRows, roles: Roles | None = None) -> Denoise:
        """Return a denoiser that evaluates parts in the training's precision."""
        inner = in_parts(denoise_rows, self.drawing.batch)

        def denoise(x: Tensor, t: Tensor) -> Split:
            with self._computing(roles):
                return inner(x, t)

        return denoise

    def _computing(self, roles: Roles | None) -> AbstractContextManager[None]:
        return computing(self.drawing.precision, device_of(self.teacher.module), roles)

    def show(self, roles: Roles, iteration: int, method: Method) -> Shown:
        """Write `samples/step_N.png` and check the images.

        Before the first iteration the teacher's images are checked, not the student's.
        """
        with roles.averaged():
            own = {k: self._looked(self._student(roles, method, k)[-1].x) for k in method.counts}
        rows = {f"teacher, {self.drawing.teacher_steps} steps": self.reference}
        rows |= {f"student, {plural(k, 'step')}": images for k, (images, _) in own.items()}
        if isinstance(method, DistributionMatching):
            rows |= self._compared(roles, method)
        if self.folder is not None or in_notebook():
            grid = draw_grid(torch.stack(list(rows.values())), list(rows), self.prompts)
            self.image = png(grid)
            if self.folder is not None:
                self.image = write_bytes(self.folder / preview_file(iteration), self.image)
        goal = self.seen.cpu()
        distances = {k: self._distance(images.cpu(), goal) for k, (images, _) in own.items()}
        if not iteration:
            return Shown(unfit(self.look, self.moderate, method.guidance.scale), distances)
        return Shown([line for k, (_, seen) in own.items() for line in self._left(seen, k)], distances)

    def _distance(self, images: Tensor, goal: Tensor) -> float:
        """Return `paired_distance` of features of two sets of images.

        NaN where either set is not finite; the run goes on and says so.
        """
        if not (finite(images) and finite(goal)):
            return math.nan
        return paired_distance(features(self.features, images), features(self.features, goal))

    def _left(self, seen: ImageStats, count: int) -> list[str]:
        """Return warnings where the student has drifted from the teacher.

        The student of step count `count` is compared with the teacher as guided in training, and with the
        teacher under moderate guidance. Each kind of drift is said once.
        """
        where, start = f" in {plural(count, 'step')}", self.starts[count]
        found = drift(seen, self.look, start, where=where)
        if self.moderate is not None:
            said = {line.split()[1] for line in found}
            more = drift(seen, self.moderate, start, f"the teacher's at guidance {MODERATE:g}", where)
            found += [line for line in more if line.split()[1] not in said]
        return found

    def _compared(self, roles: Roles, method: DistributionMatching) -> dict[str, Tensor]:
        """Return the clean estimates of student, teacher and fake score.

        The estimates are those at a state drawn as in training. The fake score should predict what the
        student does; the difference between fake score and teacher is where the student is pushed.
        """
        count, size, device = method.counts[0], self.drawing.batch, device_of(self.teacher.module)
        found: list[list[Tensor]] = []
        with torch.no_grad(), self._computing(roles):
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
        return trajectory(
            self.teacher, self._conditioned(roles, method, steps), self.seeds, times, method.sampler, roles.head
        )

    def compare(self, roles: Roles, method: Method) -> Images:
        """Sample the images and the trajectories of the report.

        The rows are the guided teacher; then, for every step count, the teacher at the student's cost and
        the student. The trajectories are those of teacher and student at the largest step count.

        Where a guided step costs two NFE, the teacher has the default student's NFE in two forms: unguided
        steps, and half as many guided steps.
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
        return Images(
            self.prompts,
            rows,
            paths,
            self._step_grid(roles, method, shown)
            if roles.condition_values and method.condition_on == "steps"
            else None,
        )

    def _step_grid(self, roles: Roles, method: Method, shown: int) -> StepGrid:
        """Sample a student for every pair of its step counts.

        The student is conditioned on one step count and sampled in another.
        """
        counts = sorted(method.counts)

        def sampled(condition: int, steps: int) -> Tensor:
            times = method.times(self.teacher.schedule, steps)
            return strip(
                sample_images(
                    self.teacher,
                    self._conditioned(roles, method, condition),
                    self.seeds[:shown],
                    times,
                    method.sampler,
                    roles.head,
                ),
                1,
            )

        images = torch.stack([torch.stack([sampled(value, steps) for steps in counts], 1) for value in counts], 1)
        return StepGrid(counts, counts, images)


def labelled(who: str, step: str, steps: int, cost: int | None = None) -> str:
    """Return a label such as `student, 4 steps (3 evaluations)`.

    The labels are those of `report.images.Images`.
    """
    name = f"{who}, {plural(steps, step)}"
    return name if cost is None else f"{name} ({plural(cost, 'evaluation')})"
