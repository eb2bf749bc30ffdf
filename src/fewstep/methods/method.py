"""What the training loop asks of a method."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones.base import Cond
from ..core.schedule import Schedule
from ..core.solvers import Denoise, free_first
from ..roles.roles import Role, Roles


class Real(NamedTuple):
    """Pictures of one batch: clean states [B, ...] and their conditions."""

    x0: Tensor
    cond: Cond


class Walk(NamedTuple):
    """Trajectories of the teacher: states [B, J, ...] at times [J], from noise to data, and their conditions."""

    states: Tensor
    times: Tensor
    cond: Cond


class Turn(NamedTuple):
    """What one iteration is given. `rng` lies on the network's device; `pictures` and `walk` are there where the method asks for them."""

    iteration: int  # from 0
    iterations: int
    batch: int
    cond: Cond
    null: Cond  # [1, ...]
    pictures: Real | None
    rng: torch.Generator
    walk: Walk | None = None
    steps: int | None = None  # K of this iteration, the same for all its batches and processes; None: the method draws it


class Loss(NamedTuple):
    """One update to make: whose, by which loss, and what to log. With `together`, its gradient and the next one's belong to the same weights."""

    role: Role
    value: Tensor
    metrics: dict[str, Tensor]
    together: bool = False


def draw_count(steps: int | tuple[int, ...], rng: torch.Generator) -> int:
    """The step count of an iteration, evenly from the list: one that it names twice comes twice as often."""
    if isinstance(steps, int):
        return steps
    return steps[int(torch.randint(len(steps), (), generator=rng, device=rng.device))] if len(steps) > 1 else steps[0]


class Needs(NamedTuple):
    """What a method asks for besides student, teacher and prompts."""

    fake: bool = False  # a fake score
    adversary: bool = False  # a discriminator
    pictures: bool = False  # clean states, of real pictures or of the teacher's
    paths: bool = False  # trajectories of the teacher
    length: bool = False  # a run whose length is known: what an iteration does depends on it


class Method(Protocol):
    """Who is updated, in which order, by which objective; and how the student that comes out is called."""

    @property
    def name(self) -> str: ...
    @property
    def guidance(self) -> float: ...
    @property
    def guidance_parallel(self) -> float:
        """The share of guidance along the clean estimate that the student is taught, see `backbones.base.projected`."""
        ...

    @property
    def solver(self) -> str: ...
    @property
    def steps(self) -> int | tuple[int, ...]:
        """What each iteration's step count is drawn from."""
        ...

    @property
    def needs(self) -> Needs: ...
    @property
    def head(self) -> str:
        """The kind of head that corrects the student's direction, `keep` for one that it begins with, `fold` to do without that, or `none`."""
        ...

    @property
    def free_first(self) -> bool:
        """Whether the first direction is taken without the network."""
        ...

    @property
    def warmup(self) -> int:
        """Iterations before the student's first update."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student serves, the default first."""
        ...

    @property
    def conditioned(self) -> tuple[float, ...]:
        """What the trained networks are told apart, the default first: step counts or, as `tells` says, guidance scales; usually none."""
        ...

    @property
    def tells(self) -> Literal["steps", "guidance"]: ...

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The student's grid, `[K + 1]`, for its default step count or another."""
        ...

    def losses(self, roles: Roles, turn: Turn) -> Iterator[Loss]:
        """The updates of one iteration in order; the caller takes each step before asking for the next, or both where they go together."""
        ...


def student_of(
    method: Method, roles: Roles, cond: Cond, steps: int | None = None, guidance: float | None = None, always: bool = False
) -> Denoise:
    """The student as its method samples it, told its step count or guidance scale (default: its first). `always`: see `core.solvers.free_first`."""
    denoise = roles.denoise("student", cond, steps if method.tells == "steps" else guidance)
    return free_first(denoise, roles.backbone.schedule, always) if method.free_first else denoise


def require_beginning(method: Method, head: str, free: bool, whose: str) -> None:
    """Raises ValueError where a method cannot go on from a student with a head of this kind ('' for none), or with a free first direction."""
    if method.head == "fold" and not head:
        raise ValueError(f"method.head: got fold, {whose} has none; set method.head=none, or begin as a student with a head (start, first)")
    if head and method.head not in ("keep", "fold", "none", head):
        raise ValueError(f"method.head: got {method.head}, {whose} has {head}; choose that, or none")
    if free and not method.free_first:
        raise ValueError(
            f"method.free_first: got false, {whose} takes its first direction without the network; set method.free_first=true, or begin as another"
        )
