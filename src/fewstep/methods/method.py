"""What the training loop asks of a method."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones.base import Cond
from ..core.schedule import Schedule
from ..roles.roles import Role, Roles


class Real(NamedTuple):
    """Pictures of one batch: clean states [B, ...] and their conditions."""

    x0: Tensor
    cond: Cond


class Turn(NamedTuple):
    """What one iteration is given. `rng` lies on the network's device; `pictures` are there where the method asks for them."""

    iteration: int  # from 0
    iterations: int
    batch: int
    cond: Cond
    null: Cond  # [1, ...]
    pictures: Real | None
    rng: torch.Generator


class Loss(NamedTuple):
    """One update to make: whose, by which loss, and what to log."""

    role: Role
    value: Tensor
    metrics: dict[str, Tensor]


class Method(Protocol):
    """Who is updated, in which order, by which objective; and how the student that comes out is called."""

    @property
    def name(self) -> str: ...
    @property
    def guidance(self) -> float: ...
    @property
    def solver(self) -> str: ...
    @property
    def warmup(self) -> int:
        """Iterations before the student's first update."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student serves, the default first."""
        ...

    @property
    def conditioned(self) -> tuple[int, ...]:
        """The step counts that the trained networks are told apart; usually none."""
        ...

    @property
    def adversary(self) -> bool:
        """Whether a discriminator is trained."""
        ...

    @property
    def wants_pictures(self) -> bool:
        """Whether iterations are given clean states, of real pictures or of the teacher's."""
        ...

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The student's grid, `[K + 1]`, for its default step count or another."""
        ...

    def losses(self, roles: Roles, turn: Turn) -> Iterator[Loss]:
        """The updates of one iteration in order; the caller takes each step before asking for the next."""
        ...
