"""Imitating the teacher's own path from diffused pictures: latent consistency models and progressive distillation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core import timegrid
from ..core.schedule import Schedule, diffuse
from ..core.solvers import Denoise, land, solver_named
from ..core.weighting import WEIGHTINGS, weighting_named
from ..objectives.regression import consistency_function, landing_target, metric_named
from ..roles.roles import Roles
from ..words import speaks_python
from .method import Loss, Needs, Turn
from .settings import MOST_STEPS, require_choice, require_guidance, require_name, require_positive, require_whole

TARGETS = ("consistency", "progressive")


@speaks_python("method")
@dataclass(frozen=True)
class Imitation:
    """Settings of the method. Raises ValueError for settings that cannot be.

    `consistency` (LCM, arXiv 2310.04378): at two neighbouring times of the guided teacher's `solver_steps`-step path, the student
    says at the noisier one what its average says at the cleaner one; the student's own times are among them. `progressive` (arXiv 2202.00512): in `stages` stages of equal
    length, one student step lands where two steps of the stage before land, until `steps` are left. `scales` are further guidance
    scales: every iteration draws one of all, and the student is told which (LCM's guidance embedding).
    `guidance_parallel`: see `backbones.base.projected`.
    """

    steps: int = 4
    guidance: float = 3.5
    scales: tuple[float, ...] = ()
    guidance_parallel: float = 1.0
    target: Literal["consistency", "progressive"] = "consistency"
    loss: str = "huber"
    solver_steps: int = 48  # a multiple of 1, 2, 3, 4, 6 and 8
    stages: int = 3
    weight: str = "own"
    snr_clip: float = 5.0
    solver: str = "renoise"
    shift: float = 1.0
    name: str = "lcm"

    def __post_init__(self) -> None:
        metric_named(self.loss), solver_named(self.solver)
        require_choice(self, "target", TARGETS)
        require_choice(self, "weight", tuple(WEIGHTINGS))
        require_whole(self, "steps", "solver_steps", "stages", most=MOST_STEPS)
        require_positive(self, "shift", "snr_clip")
        require_guidance(self)
        if self.name == "lcm" and self.target == "progressive":  # the default name
            object.__setattr__(self, "name", "progressive")
        require_name(self)
        if self.target == "consistency" and self.solver_steps % self.steps:
            raise ValueError(
                f"method.solver_steps: got {self.solver_steps}, allowed are multiples of method.steps ({self.steps}), so that the student is trained at the times it is asked for"
            )
        if self.scales and self.target != "consistency":
            raise ValueError("method.scales: several guidance scales are for method.target=consistency; leave it out")
        served = (self.guidance, *self.scales)
        if self.scales and (min(served) <= 1 or len(set(served)) < len(served)):
            raise ValueError(
                f"method.scales: got {list(self.scales)}, allowed are different numbers above 1, besides method.guidance ({self.guidance:g})"
            )

    @property
    def warmup(self) -> int:
        return 0

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.steps,)

    @property
    def head(self) -> str:
        return "none"

    @property
    def free_first(self) -> bool:
        return False

    @property
    def tells(self) -> Literal["steps", "guidance"]:
        return "guidance"

    @property
    def conditioned(self) -> tuple[float, ...]:
        """All guidance scales that it serves, where there are several."""
        return (self.guidance, *self.scales) if self.scales else ()

    @property
    def needs(self) -> Needs:
        """Pictures; progressive distillation keeps the student of the stage before as the fake role."""
        return Needs(fake=self.target == "progressive", pictures=True, length=self.target == "progressive")

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        return timegrid.uniform(schedule, steps or self.steps, self.shift)

    def losses(self, roles: Roles, turn: Turn) -> Iterator[Loss]:
        value = consistency_loss(self, roles, turn) if self.target == "consistency" else progressive_loss(self, roles, turn)
        yield Loss("student", value, {"student_loss": value.detach()})


def consistency_loss(method: Imitation, roles: Roles, turn: Turn) -> Tensor:
    """`d(F(x_t, t), sg F_average(x_s, s))`, x_s one guided DDIM step of the teacher from x_t; on clean data F is the identity."""
    assert turn.pictures is not None
    schedule, (x_0, cond) = roles.backbone.schedule, turn.pictures
    scales = method.conditioned or (method.guidance,)
    scale = scales[int(torch.randint(len(scales), (), generator=turn.rng, device=turn.rng.device))] if len(scales) > 1 else scales[0]
    times = timegrid.uniform(schedule, method.solver_steps, method.shift).to(turn.rng.device)
    n = torch.randint(method.solver_steps, (turn.batch,), generator=turn.rng, device=turn.rng.device)
    t, s = times[n], times[n + 1]
    x_t = diffuse(schedule, x_0, t, torch.randn(x_0.shape, generator=turn.rng, device=turn.rng.device))
    with torch.no_grad():
        x_s = land(schedule, roles.teacher(cond, turn.null, scale, method.guidance_parallel)(x_t, t), s)
        # A network is not asked about clean data; there its answer counts for nothing.
        known = s.clamp(min=schedule.t_clean + (schedule.resolution or 1e-3))
        with roles.averaged():
            goal = consistency_function(x_s, roles.denoise("student", cond, scale)(x_s, known).x0, s, schedule.t_clean)
    own = consistency_function(x_t, roles.denoise("student", cond, scale)(x_t, t).x0, t, schedule.t_clean)
    return metric_named(method.loss)(own, goal).mean()


def stage_of(method: Imitation, iteration: int, iterations: int) -> tuple[int, bool]:
    """(stage, whether it begins here), stages of equal length."""
    stage = min(method.stages - 1, iteration * method.stages // max(iterations, 1))
    return stage, iteration > 0 and stage > 0 and stage != min(method.stages - 1, (iteration - 1) * method.stages // iterations)


def progressive_loss(method: Imitation, roles: Roles, turn: Turn) -> Tensor:
    """Weighted regression on the clean estimate whose single step lands where two steps of the stage before land.

    The stage before is the guided teacher, then the averaged student as it was when the stage began, kept as the `fake` role.
    """
    assert turn.pictures is not None
    schedule, (x_0, cond) = roles.backbone.schedule, turn.pictures
    stage, begins = stage_of(method, turn.iteration, turn.iterations)
    if begins:
        roles.keep_average_as_fake()
    guided = roles.teacher(cond, turn.null, method.guidance, method.guidance_parallel)
    before: Denoise = roles.denoise("fake", cond) if stage else guided
    steps = method.steps * 2 ** (method.stages - 1 - stage)
    fine = timegrid.uniform(schedule, 2 * steps, method.shift).to(turn.rng.device)
    segment = timegrid.draw_segments(turn.batch, steps, turn.rng)
    high, middle, low = fine[2 * segment], fine[2 * segment + 1], fine[2 * segment + 2]
    x = diffuse(schedule, x_0, high, torch.randn(x_0.shape, generator=turn.rng, device=turn.rng.device))
    with torch.no_grad():
        x_middle = land(schedule, before(x, high), middle)
        x_low = land(schedule, before(x_middle, middle), low)
        goal = landing_target(schedule, x, x_low, high, low)
    own = roles.denoise("student", cond)(x, high).x0
    weight = weighting_named(method.weight)(schedule, roles.backbone.row, high, method.snr_clip)
    return (weight.to(own) * metric_named(method.loss)(own, goal)).mean()
