"""A monitor that says whether the student is going wrong.

The signs are losses and gaps that grow, states that leave the teacher's, and a student no better than the
initial student.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from ..backbones.base import nfe_per_step, rows
from ..backbones.generate import in_parts, require_seed, trajectory
from ..backbones.parts import DiffusersBackbone
from ..config_fields import COUNT, Range, check_fields
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.solvers import Denoise
from ..data.prompts import Embeddings
from ..evaluation.states import cells, energy_distance, energy_noise, shares, shifted, spread
from ..methods.method import Method, student_of
from ..roles.roles import Roles
from ..training.loop import TrainConfig
from ..words import speaks_python
from .preview import Preview

SHARE = 0.25  # of the training's NFE that watching may cost
CALLS = 7  # NFE per sample of an iteration, about: TDM with four steps
LEAST, MOST = 32, 512  # states that are compared
IMAGES = 8  # images that are compared
TOLERANCE = 0.35  # relative difference of the spread
SEEN = 0.01  # the least gap that counts, in the units of states
LIMITS = {"_loss": 5.0, "gap": 3.0}  # growth of losses and of gaps that gives a warning


class DistillationWarning(UserWarning):
    """A line of the monitor.

    The student is going wrong, or is no better than the initial student.
    """


@speaks_python("watch")
@dataclass(frozen=True)
class Watch:
    """How a run is watched.

    Every `every` iterations and at the end, the student is compared with the teacher in `teacher_steps`
    steps.

    `count` is the number of states, or of images for a pipeline. The default is as many as cost a quarter of
    the training at most: up to 512 states or 8 images, and none in a run too short for 32 or 8. Losses and
    gaps are watched in every run.
    """

    every: Annotated[int, COUNT] = 100
    count: Annotated[int, Range(2, hint="; watch=None watches nothing but losses")] | None = None
    teacher_steps: Annotated[int, COUNT] = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "watch")
        require_seed(self.seed, "watch.seed")


@dataclass
class Trend:
    """The growth of losses and gaps, per segment.

    The median of the last ten values is compared with the median of the first quarter of all values. A
    warning is repeated each time the growth has doubled.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float]) -> list[str]:
        """Return one line for each number that outgrew its limit.

        NaN is skipped.
        """
        found = []
        for name, value in metrics.items():
            limit = next(
                (most for part, most in LIMITS.items() if name.endswith(part) or name.startswith(f"{part}_")), None
            )
            matching = name == "student_loss" and any(n.startswith("gap_") for n in metrics)
            # A matching loss starts at zero, where the fake score is the teacher: gaps are watched instead.
            if limit is None or matching or value != value:
                continue
            seen = self.values.setdefault(name, [])
            seen.append(value)
            quarter = len(seen) // 4
            if quarter < 4:
                continue
            first, last = (statistics.median(part) for part in (seen[: min(50, quarter)], seen[-min(10, quarter) :]))
            least = 1e-8 if name.endswith("_loss") else SEEN
            if first > 1e-8 and last > least and not last <= first * max(limit, 2 * self.told.get(name, 0.0)):
                self.told[name] = last / first
                found.append(_grown(name, first, last))
        return found


def _grown(name: str, first: float, last: float) -> str:
    cure = (
        "lower train.lr"
        if name.startswith(("student", "regression", "absorb"))
        else "raise train.fake_lr or method.fake.updates, or lower train.lr"
    )
    what = "GAP: the fake score no longer follows the student," if name.startswith("gap") else "LOSS:"
    return f"{what} {name} is {last / first:.1f} times what it was at first ({first:.3g} -> {last:.3g}); {cure}"


class StateWatch:
    """A monitor of states, for a network that samples no images.

    The student's states are compared with the teacher's states from other noise, and with the initial
    student's states. While the student is trained, only what has become worse than at the beginning is said.
    """

    def __init__(self, watch: Watch, count: int, roles: Roles, method: Method, data: Embeddings, batch: int) -> None:
        backbone, self.method, self.watch, self.count, self.batch = roles.backbone, method, watch, count, batch
        device = next(backbone.module.parameters()).device
        order = torch.randperm(data.count, generator=torch.Generator().manual_seed(watch.seed))
        of = order.repeat(-(-count // data.count))[:count]
        self.cond = data.at(of, device)
        self.null = data.unconditional(device)
        self.seeds = [watch.seed + i for i in range(count)]
        self.teacher = self._of_teacher(roles, watch.teacher_steps, method.guidance, [s + count for s in self.seeds])
        self.centres = cells(self.teacher)
        self.expected, self.wide = shares(self.teacher, self.centres), spread(self.teacher)
        begun = self._of_student(roles)
        self.begun, self.noise = energy_distance(begun, self.teacher), energy_noise(begun, self.teacher)
        self.begun_wide, self.begun_shares = spread(begun) / max(self.wide, 1e-12), shares(begun, self.centres)
        few = [
            self._of_teacher(roles, method.counts[0], guidance, self.seeds)
            for guidance in {Guidance(), method.guidance}
        ]
        self.few = min(energy_distance(x, self.teacher) for x in few)

    def look(self, roles: Roles, last: bool) -> tuple[list[str], dict[str, float]]:
        """Return (warnings, numbers) of the averaged student as it is now."""
        own = self._of_student(roles)
        distance, ratio, found = energy_distance(own, self.teacher), spread(own) / max(self.wide, 1e-12), []
        if not abs(ratio - 1) <= (TOLERANCE if last else max(TOLERANCE, 1.2 * abs(self.begun_wide - 1))):
            cure = (
                "modes are being lost: lower train.lr, raise train.fake_lr or method.fake.updates"
                if ratio < 1
                else "lower train.lr or method.guidance"
            )
            found.append(f"DRIFT: the spread of the student's samples is {ratio:.2f} of the teacher's; {cure}")
        own_shares = shares(own, self.centres)
        farther = (own_shares - self.expected).abs() > 1.2 * (self.begun_shares - self.expected).abs()
        compared = own_shares if last else torch.where(farther, own_shares, self.expected)
        if (places := shifted(compared, self.expected, self.count)) is not None:
            found.append(
                f"MODES: {100 * places[0]:.0f} % of the student's samples lie in a region that holds "
                f"{100 * places[1]:.0f} % of the teacher's; lower train.lr"
            )
        told = f"{distance:.3g}, {self.begun:.3g} at its beginning"
        if not distance <= 1.2 * self.begun + self.noise:
            found.append(
                "WORSE: the student is further from its teacher than where it began "
                f"(energy distance {told}); lower train.lr, or keep an earlier one"
            )
        elif last and not distance <= self.few + self.noise:
            found.append(
                f"WORSE: the student is no better than its teacher in as many steps (energy distance {told}, "
                f"the teacher's {self.few:.3g}); train for longer, or raise train.lr"
            )
        return found, {"distance": distance, "spread": ratio}

    def _of_teacher(self, roles: Roles, steps: int, guidance: Guidance, seeds: list[int]) -> Tensor:
        def rowed(r: slice) -> Denoise:
            return roles.teacher(rows(self.cond, r), self.null, guidance)

        times = timegrid.uniform(roles.backbone.schedule, steps)
        return trajectory(roles.backbone, in_parts(rowed, self.batch), seeds, times)[-1].x.float().cpu()

    def _of_student(self, roles: Roles) -> Tensor:
        count = self.method.counts[0]
        with roles.averaged():
            denoise = in_parts(lambda r: student_of(self.method, roles, rows(self.cond, r), count), self.batch)
            times = self.method.times(roles.backbone.schedule, count)
            states = trajectory(roles.backbone, denoise, self.seeds, times, self.method.sampler, roles.head)
        return states[-1].x.float().cpu()


def affordable(
    watch: Watch, method: Method, cond: Mapping[str, Tensor], config: TrainConfig, most: int, least: int
) -> int:
    """Return how many samples watching takes.

    The number is `watch.count`, by default as many as cost `SHARE` of the training, up to `most`; 0 where
    `least` samples cost more.
    """
    if watch.count is not None:
        return watch.count
    training = config.iterations * (config.global_batch or config.batch * config.accumulate) * CALLS
    count = int(SHARE * training / (watch.teacher_steps * nfe_per_step(cond, method.guidance)))
    return min(most, count) if count >= least else 0


class Watcher:
    """The monitor of a run in Python.

    `seen` is called after every iteration.
    """

    def __init__(
        self,
        watch: Watch | None,
        roles: Roles,
        method: Method,
        data: Embeddings,
        config: TrainConfig,
        preview: Preview | None,
    ) -> None:
        self.watch, self.preview, self.trend, self.method, self.config = watch, preview, Trend(), method, config
        self.states: StateWatch | None = None
        own = watch is not None and not isinstance(roles.backbone, DiffusersBackbone)
        if own and watch is not None and (count := affordable(watch, method, data.null, config, MOST, LEAST)):
            self.states = StateWatch(watch, count, roles, method, data, max(config.batch, 64))

    def seen(self, roles: Roles, iteration: int, metrics: Mapping[str, float]) -> tuple[list[str], dict[str, float]]:
        """Return (warnings, numbers to log) of this iteration.

        The warnings name settings as recipes do.
        """
        found, last = self.trend.add(metrics), iteration >= self.config.iterations
        every = 0 if self.watch is None else min(self.watch.every, max(1, self.config.iterations // 4))
        if not every or (iteration % every and not last) or iteration <= self.method.warmup:
            return found, {}
        if self.preview is not None:
            found += self.preview.show(roles, iteration, self.method).warnings
        if self.states is None:
            return found, {}
        warnings, numbers = self.states.look(roles, last)
        return found + warnings, numbers
