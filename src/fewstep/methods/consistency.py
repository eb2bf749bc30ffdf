"""Consistency distillation along the teacher's trajectory (LCM).

The student's clean estimate is trained to be the same along the teacher's trajectory.

Source: latent consistency models, arXiv 2310.04378.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..backbones.base import Cond
from ..config_fields import OneOf, Range
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.schedule import diffuse
from ..core.solvers import SOLVERS, ddim_step
from ..objectives.regression import REGRESSION_LOSSES, consistency_function
from ..roles.roles import Roles
from ..transfer import sent
from ..words import speaks_python
from .method import MOST_STEPS, Loss, Method, Needs, TrainBatch
from .names import require_name


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(Method):
    """Settings of consistency distillation.

    At two neighbouring times of the guided teacher's trajectory, the student at the noisier time is trained
    to predict what the student's average predicts at the cleaner time. Raises ValueError for invalid
    settings.
    """

    name: str = "lcm"

    solver: Annotated[str, OneOf(SOLVERS)] = "renoise"
    """Solver that the student is sampled with."""

    guidance_scales: tuple[float, ...] = ()
    """Further guidance scales: every iteration draws one of all, on which the student is conditioned (LCM's guidance
    embedding)."""

    loss: Annotated[str, OneOf(REGRESSION_LOSSES)] = "huber"
    """Regression loss."""

    solver_steps: Annotated[int, Range(1, MOST_STEPS)] = 48  # a multiple of 1, 2, 3, 4, 6 and 8
    """Steps of the teacher's path; a multiple of `steps`, so that the student is trained at its own times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_name(self)
        if len(self.counts) > 1:
            raise ValueError(
                f"method.steps: got {list(self.counts)}, method {self.name} makes students of one step count; "
                "choose one"
            )
        if self.solver_steps % self.counts[0]:
            raise ValueError(
                f"method.solver_steps: got {self.solver_steps}, allowed are multiples of method.steps "
                f"({self.counts[0]}), so that the student is trained at its own times"
            )
        served = (self.guidance.scale, *self.guidance_scales)
        if self.guidance_scales and (min(served) <= 1 or len(set(served)) < len(served)):
            raise ValueError(
                f"method.guidance_scales: got {list(self.guidance_scales)}, allowed are different numbers above 1, "
                f"besides method.guidance ({self.guidance.scale:g})"
            )

    @property
    def needs(self) -> Needs:
        return Needs(images=True)

    @property
    def condition_on(self) -> Literal["steps", "guidance"]:
        return "guidance"

    @property
    def condition_values(self) -> tuple[float, ...]:
        """All guidance scales that the student serves; empty for a single scale."""
        return (self.guidance.scale, *self.guidance_scales) if self.guidance_scales else ()

    @property
    def separate(self) -> bool:
        return True

    def losses(self, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        value = consistency_loss(self, roles, batch)
        yield Loss("student", value, {"student_loss": value.detach()})


def consistency_loss(method: ConsistencyDistillation, roles: Roles, batch: TrainBatch) -> Tensor:
    """Return the consistency loss of the student.

    `d(F(x_t, t), sg F_average(x_s, s))`, where x_s is one guided DDIM step of the teacher from x_t and F is
    the consistency function, the identity on clean data.
    """
    assert batch.images is not None
    schedule, rng, (x_0, cond) = roles.backbone.schedule, batch.rng, batch.images
    scale = draw_scale(method.condition_values or (method.guidance.scale,), batch.host_rng)
    times = sent(timegrid.uniform(schedule, method.solver_steps, method.shift), rng.device)
    n = torch.randint(method.solver_steps, (batch.batch,), generator=rng, device=rng.device)
    t, s = times[n], times[n + 1]
    x_t = diffuse(schedule, x_0, t, torch.randn(x_0.shape, generator=rng, device=rng.device))
    with torch.no_grad():
        x_s = teacher_step(roles, cond, batch.null, replace(method.guidance, scale=scale), x_t, t, s)
        # On clean data the prediction has zero weight: call the network at the nearest noisy time instead.
        known = s.clamp(min=schedule.t_clean + (schedule.resolution or 1e-3))
        with roles.averaged():
            goal = consistency_function(x_s, roles.denoise("student", cond, scale)(x_s, known).x0, s, schedule.t_clean)
    own = consistency_function(x_t, roles.denoise("student", cond, scale)(x_t, t).x0, t, schedule.t_clean)
    return REGRESSION_LOSSES[method.loss](own, goal).mean()


def draw_scale(scales: tuple[float, ...], rng: torch.Generator) -> float:
    """Draw one of several guidance scales, evenly."""
    return (
        scales[int(torch.randint(len(scales), (), generator=rng, device=rng.device))] if len(scales) > 1 else scales[0]
    )


def teacher_step(
    roles: Roles, cond: Cond, null: Cond, guidance: Guidance, x: Tensor, t: Tensor, t_next: Tensor
) -> Tensor:
    """Take one DDIM step of the guided teacher.

    x [B, ...] at t; t, t_next [B]. Returns the state at t_next.
    """
    return ddim_step(roles.backbone.schedule, roles.teacher(cond, null, guidance)(x, t), t_next)
