"""Trajectory imitation along the student's rollout.

Every step of the rollout is regressed on the teacher's state from the same noise.

TrajP-L trains a LoRA and a head that corrects the direction. Ablations and rival methods are settings: no
head (LoRA alone; with full weights SFD), no LoRA (head alone; with shared weights PAS). A student absorbs a
head by imitating the student with the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch

from ..config_fields import OneOf
from ..core.prediction import Split
from ..core.solvers import SOLVERS, SolverHistory, SolverStep, at_time, sample, solver_named, step
from ..heads.head import KINDS
from ..objectives.regression import REGRESSION_LOSSES
from ..roles.roles import Roles
from ..words import speaks_python
from .method import (
    Loss,
    Method,
    Needs,
    TrainBatch,
    TrajectoryBatch,
    draw_count,
    require_analytic_first_step,
    student_of,
)
from .names import require_name


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class TrajectoryImitation(Method):
    """Settings of trajectory imitation; the defaults are TrajP-L's.

    Raises ValueError for invalid settings.
    """

    name: str = "trajp-l"

    solver: Annotated[str, OneOf(tuple(s.name for s in SOLVERS.values() if not s.stochastic))] = "ddim"
    """Solver that the student is trained and sampled with."""

    condition: bool = True
    """Condition the student on the step count, where there are several."""

    loss: Annotated[str, OneOf(REGRESSION_LOSSES)] = "l1"
    """Regression loss."""

    head: Annotated[str, OneOf(("none", *KINDS))] = "span"
    """Kind of head that corrects the direction: `span` has weights for each trained step, `curve` knows steps by the
    trajectories' common curve alone and serves untrained ones, `shared` is PAS's; `none` trains none, `roles.rank: 0`
    trains the head alone."""

    analytic_first_step: bool = False
    """Take the first direction analytically, without a network evaluation (AFS, arXiv 2210.05475)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_analytic_first_step(self)
        require_name(self)

    @property
    def init_head(self) -> Literal["keep", "absorb", "drop"]:
        return "drop" if self.head == "none" else "keep"

    @property
    def condition_values(self) -> tuple[int, ...]:
        return self.counts if self.condition and len(self.counts) > 1 else ()

    @property
    def needs(self) -> Needs:
        return Needs(trajectories=True)

    @property
    def separate(self) -> bool:
        return True

    def losses(self, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        assert batch.trajectories is not None
        return imitate(
            self, roles, batch.trajectories, batch.steps or draw_count(self.steps, batch.host_rng), self.loss
        )


def imitate(
    method: Method, roles: Roles, walk: TrajectoryBatch, count: int, loss: str, called: str = "student_loss"
) -> Iterator[Loss]:
    """Yield one update per step of the student's rollout.

    Each step starts from the student's state, not the teacher's, and has no gradient through earlier steps.
    """
    schedule, solver = roles.backbone.schedule, solver_named(method.solver)
    states, known, cond = walk.states, walk.times, walk.cond
    x = states[:, 0]
    history = SolverHistory(x / schedule.start_std)
    for k, (start, end) in enumerate(pairwise(method.times(schedule, count))):
        student = student_of(method, roles, cond, count, step=torch.tensor([k]))
        t, t_next = at_time(start, x), at_time(end, x)
        landed, done = step(solver, schedule, student(x, t), t, t_next, history, roles.head)
        goal = states[:, int((known - end).abs().argmin())]
        value = REGRESSION_LOSSES[loss](landed, goal).mean()
        x, history = landed.detach(), SolverHistory(history.noise, (_detached(done), *history.steps))
        if value.requires_grad:  # without a head, an analytic first step has nothing to train
            yield Loss("student", value, {called: value.detach()})


def absorb_head(method: Method, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
    """Yield the updates that absorb the head into the student's weights.

    Each update trains the student without the head to land where the student with the head landed, from the
    same noise; the teacher is not used. The student's average serves as the student with the head, because
    the average does not move before the method's own first update.
    """
    schedule, count = roles.backbone.schedule, batch.steps or draw_count(method.steps, batch.host_rng)
    times, shape = method.times(schedule, count), (batch.batch, *roles.backbone.shape)
    x = torch.randn(shape, generator=batch.rng, device=batch.rng.device) * schedule.start_std
    with torch.no_grad(), roles.averaged():
        before = student_of(method, roles, batch.cond, count)
        states = [s.x for s in sample(before, schedule, x, times, solver_named(method.solver), roles.head_to_absorb)]
    yield from imitate(
        method, roles, TrajectoryBatch(torch.stack(states, 1), times, batch.cond), count, "l1", "absorb_loss"
    )


def _detached(done: SolverStep) -> SolverStep:
    return SolverStep(done.t, *(Split(*(part.detach() for part in split)) for split in (done.pred, done.used)))
