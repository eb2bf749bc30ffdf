"""Imitating the teacher's own trajectories: along the student's rollout every step is pulled to the teacher's state from the same noise.

TrajP-L trains a LoRA and a head that corrects the direction; its ablations and rivals are settings: no head (LoRA alone; with full
weights SFD), no LoRA (head alone; with shared weights PAS). A student folds a head away by imitating itself with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..core import timegrid
from ..core.prediction import Split
from ..core.schedule import Schedule
from ..core.solvers import Past, Visit, sample, solver_named, step
from ..objectives.regression import metric_named
from ..roles.roles import Roles
from ..trajp.head import KINDS
from ..words import speaks_python
from .method import Loss, Method, Needs, Turn, Walk, draw_count, student_of
from .settings import require_choice, require_counts, require_free_first, require_guidance, require_name, require_positive


@speaks_python("method")
@dataclass(frozen=True)
class PathImitation:
    """Settings of the method. Raises ValueError for settings that cannot be.

    `steps`: one count or several, of which every iteration draws one (named twice, twice as often); `condition` tells the student which. `head` corrects the
    direction (`trajp.head`), `none` leaves it out; `roles.rank: 0` leaves out the LoRA. `free_first` takes the first direction
    without the network (AFS), which saves one evaluation. `guidance` and `guidance_parallel` (`backbones.base.projected`) are the
    teacher's on its trajectories.
    """

    steps: int | tuple[int, ...] = 4
    condition: bool = True
    guidance: float = 3.5
    guidance_parallel: float = 1.0
    loss: str = "l1"
    head: str = "span"
    free_first: bool = False
    solver: str = "ddim"
    shift: float = 1.0
    name: str = "trajp-l"

    def __post_init__(self) -> None:
        metric_named(self.loss), solver_named(self.solver)
        require_counts(self.steps)
        require_choice(self, "head", ("none", *KINDS))
        require_choice(self, "solver", ("ddim", "dpmpp", "ipndm"))
        require_positive(self, "shift")
        require_guidance(self)
        require_free_first(self)
        require_name(self)

    @property
    def warmup(self) -> int:
        return 0

    @property
    def counts(self) -> tuple[int, ...]:
        return require_counts(self.steps)

    @property
    def tells(self) -> Literal["steps", "guidance"]:
        return "steps"

    @property
    def conditioned(self) -> tuple[int, ...]:
        return self.counts if self.condition and len(self.counts) > 1 else ()

    @property
    def needs(self) -> Needs:
        """The teacher's trajectories."""
        return Needs(paths=True)

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        return timegrid.uniform(schedule, steps or self.counts[0], self.shift)

    def losses(self, roles: Roles, turn: Turn) -> Iterator[Loss]:
        assert turn.walk is not None
        return follow(self, roles, turn.walk, turn.steps or draw_count(self.steps, turn.rng), self.loss)


def follow(method: Method, roles: Roles, walk: Walk, count: int, loss: str, called: str = "student_loss") -> Iterator[Loss]:
    """One update a step: from where the student is, not the walk, and without gradient through the steps before."""
    schedule, solver, (states, known, cond) = roles.backbone.schedule, solver_named(method.solver), walk
    student = student_of(method, roles, cond, count)
    x = states[:, 0]
    past = Past(x / schedule.start_std)
    for start, end in pairwise(method.times(schedule, count)):
        t, t_next = (s.to(x.device).expand(len(x)) for s in (start, end))
        landed, visit = step(solver, schedule, student(x, t), t, t_next, past, roles.head)
        goal = states[:, int((known - end).abs().argmin())]
        value = metric_named(loss)(landed, goal).mean()
        x, past = landed.detach(), Past(past.noise, (_detached(visit), *past.visits))
        if value.requires_grad:  # a free first step without a head has nothing to train
            yield Loss("student", value, {called: value.detach()})


def fold(method: Method, roles: Roles, turn: Turn) -> Iterator[Loss]:
    """The student learns to land without the head in `roles.folding` where it landed with it, from the same noise; no teacher is asked.

    What it was is its average, as long as that does not move: before the method's first update of its own.
    """
    schedule, count = roles.backbone.schedule, turn.steps or draw_count(method.steps, turn.rng)
    times, shape = method.times(schedule, count), (turn.batch, *roles.backbone.shape)
    x = torch.randn(shape, generator=turn.rng, device=turn.rng.device) * schedule.start_std
    with torch.no_grad(), roles.averaged():
        before = student_of(method, roles, turn.cond, count)
        states = [s.x for s in sample(before, schedule, x, times, solver_named(method.solver), roles.folding)]
    yield from follow(method, roles, Walk(torch.stack(states, 1), times, turn.cond), count, "l1", "fold_loss")


def _detached(visit: Visit) -> Visit:
    return Visit(visit.t, *(Split(*(part.detach() for part in split)) for split in (visit.here, visit.way)))
