"""The interface between methods and the training loop.

The base class `Method` holds what all methods have in common.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones.base import Cond
from ..config_fields import POSITIVE, OneOf, check_fields
from ..core import timegrid
from ..core.guidance import Guidance, guidance_of
from ..core.schedule import Schedule
from ..core.solvers import SOLVERS, Denoise, with_analytic_first_step
from ..roles.roles import Role, Roles

MOST_STEPS = 1000  # as many times as teachers are trained with
MOST_BATCH = 65_536


class RealBatch(NamedTuple):
    """Clean states [B, ...] of a batch of images, with conditions."""

    x0: Tensor
    cond: Cond


class TrajectoryBatch(NamedTuple):
    """A batch of the teacher's trajectories.

    States [B, J, ...] at times [J] on the CPU, from noise to data, with conditions.
    """

    states: Tensor
    times: Tensor
    cond: Cond
    prompts: tuple[str, ...] = ()


class TrainBatch(NamedTuple):
    """Inputs of one training iteration.

    `rng` is on the network's device; on a CPU it is `host` as well. `images` and `trajectories` are None unless the
    method needs them.
    """

    iteration: int  # from 0
    iterations: int
    batch: int
    cond: Cond
    null: Cond  # [1, ...]
    images: RealBatch | None
    rng: torch.Generator
    trajectories: TrajectoryBatch | None = None
    # K of this iteration, the same for all batches and processes; None: the method draws K.
    steps: int | None = None
    host: torch.Generator | None = None  # on the CPU, for numbers that the CPU needs; None: `rng`
    prompts: tuple[str, ...] = ()  # those of `cond`, for methods with a reward

    @property
    def host_rng(self) -> torch.Generator:
        """Generator of numbers that the CPU needs, e.g. for shapes.

        Drawn on a GPU, such a number would make the CPU wait for all that the GPU has to do before.
        """
        return self.rng if self.host is None else self.host


class Loss(NamedTuple):
    """One update: the role, the loss and what to log.

    With `together`, the gradients of this loss and of the next loss belong to the same weights.
    """

    role: Role
    value: Tensor
    metrics: dict[str, Tensor]
    together: bool = False


class Needs(NamedTuple):
    """What a method needs besides student, teacher and prompts."""

    fake: bool = False  # a fake score
    adversary: bool = False  # a discriminator
    images: bool = False  # clean states, of real images or of the teacher's samples
    trajectories: bool = False  # trajectories of the teacher
    length: bool = False  # a known number of iterations, because an iteration depends on the number
    reward: bool = False  # a reward of images
    surrogate: bool = False  # a network that learns the reward


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base class of methods.

    A method says which role is updated by which objective, in which order, and how the student is sampled.
    """

    name: str = ""
    """The method's name; its other settings have the defaults of that name."""

    steps: int | tuple[int, ...] = 4
    """Step count K of the student; of a list every iteration draws one, and the first is the default when sampling."""

    guidance: Guidance = Guidance(scale=3.5)
    """The teacher's guidance, which the student learns to do without: a scale, or a block of settings."""

    solver: Annotated[str, OneOf(SOLVERS)] = "ddim"
    """Solver that the student is trained and sampled with."""

    shift: Annotated[float, POSITIVE] = 1.0
    """Shift s of the student's time grid: the fraction u of the path becomes s u / (1 + (s - 1) u)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", guidance_of(self.guidance))
        check_fields(self, "method")
        step_counts(self.steps)

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student serves, the default first."""
        return step_counts(self.steps)

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the method needs besides student, teacher and prompts."""

    @property
    def head(self) -> str:
        """The trained kind of direction head, or `none`."""
        return "none"

    @property
    def init_head(self) -> Literal["keep", "absorb", "drop"]:
        """Treatment of a head of the initial student."""
        return "drop"

    @property
    def sampler(self) -> str:
        """The solver that the student is sampled with."""
        return self.solver

    @property
    def analytic_first_step(self) -> bool:
        """Whether the first direction is taken without the network."""
        return False

    @property
    def warmup(self) -> int:
        """Iterations before the student's first update."""
        return 0

    @property
    def condition_values(self) -> tuple[float, ...]:
        """Values the trained networks are conditioned on.

        The default comes first; empty for networks without a condition.
        """
        return ()

    @property
    def condition_on(self) -> Literal["steps", "guidance"]:
        """The meaning of `condition_values`."""
        return "steps"

    @property
    def group(self) -> int:
        """How many neighbours in a batch have one prompt."""
        return 1

    @property
    def separate(self) -> bool:
        """Whether no loss has a gradient at the weights of another role.

        Sharded training then communicates gradients once an update, otherwise once a batch.
        """
        return False

    @property
    def against_per_step(self) -> tuple[str, str, str, str] | None:
        """The setting that keeps steps from having weights of their own.

        Its option, its value, what is needed and the cure; None where they may. See `per_step`.
        """
        return "name", self.name, "distribution matching", "set it to tdm or another method of distribution matching"

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """Return the student's time grid `[K + 1]` for a step count.

        The default is the first step count.
        """
        return timegrid.uniform(schedule, steps or self.counts[0], self.shift)

    def count_at(self, iteration: int, iterations: int, rng: torch.Generator) -> int:
        """Return the step count K of an iteration.

        Iterations count from 0 to `iterations`.
        """
        return draw_count(self.steps, rng)

    def after(self, roles: Roles, iteration: int) -> None:  # noqa: B027 - most methods do nothing
        """Change the roles after all updates of an iteration."""

    def one_step(self) -> "Method":
        """Return a faster method that needs as much memory.

        An iteration of the returned method needs as much memory as an iteration of this method after the
        warm-up.
        """
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `losses` logs."""
        return ("student_loss",)

    @property
    def updated(self) -> tuple[Role, ...]:
        """Roles that are updated by gradients."""
        return ("student",)

    @abstractmethod
    def losses(self, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        """Yield the updates of one iteration in order.

        The caller takes each optimizer step before the caller asks for the next loss, or both steps where the
        losses are `together`.
        """


def step_counts(steps: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return the different step counts, the default first.

    A repeated step count counts once; `draw_count` draws a repeated count more often. Raises ValueError for
    invalid step counts.
    """
    counts = (steps,) if isinstance(steps, int) else tuple(steps)
    if not counts or not all(type(k) is int and 1 <= k <= MOST_STEPS for k in counts):
        raise ValueError(
            f"method.steps: got {steps}, allowed are whole numbers from 1 to {MOST_STEPS}, or a list of them such as "
            "[4, 2, 1]; few-step students use 1 to 8"
        )
    return tuple(dict.fromkeys(counts))


def draw_count(steps: int | tuple[int, ...], rng: torch.Generator) -> int:
    """Draw the step count of an iteration.

    The draw from a list is even, so a repeated step count is drawn more often.
    """
    if isinstance(steps, int):
        return steps
    return steps[int(torch.randint(len(steps), (), generator=rng, device=rng.device))] if len(steps) > 1 else steps[0]


def student_of(
    method: Method,
    roles: Roles,
    cond: Cond,
    steps: int | None = None,
    guidance: float | None = None,
    always: bool = False,
    step: Tensor | None = None,
) -> Denoise:
    """Return the student's denoiser as the method samples the student.

    The student is conditioned on a step count or guidance scale (default: the first). `always`: see
    `core.solvers.with_analytic_first_step`. `step` [B] or [1] on the CPU is the step of each sample, 0 at pure noise,
    for a caller who knows: a device need not be asked.
    """
    denoise = roles.denoise("student", cond, steps if method.condition_on == "steps" else guidance, step)
    if not method.analytic_first_step:
        return denoise
    return with_analytic_first_step(denoise, roles.backbone.schedule, always, None if step is None else step == 0)


def require_analytic_first_step(method: Method) -> None:
    """Check that an analytic first step is possible.

    Other steps have to follow the first step, from the same noise. Raises ValueError otherwise.
    """
    if not method.analytic_first_step:
        return
    if min(method.counts) == 1:
        raise ValueError(
            "method.analytic_first_step: got true for a student of 1 step, which would never call the network; "
            "set it to false"
        )
    for option, solver in (("solver", method.solver), ("sample_solver", method.sampler)):
        if SOLVERS[solver].stochastic:
            raise ValueError(
                f"method.analytic_first_step: got true with method.{option}={solver}, which takes no direction; "
                "set it to false, or the solver to ddim"
            )


def require_initial_student(method: Method, head: str, analytic: bool, whose: str) -> None:
    """Check that a method can be initialized from a student.

    `head` is the kind of the student's head ('' for none), and `analytic` says whether the student takes an
    analytic first step. Raises ValueError otherwise.
    """
    if method.init_head == "absorb" and not head:
        raise ValueError(
            f"method.init_head: got absorb, {whose} has no head; set method.init_head=drop, or initialize from a "
            "student with one"
        )
    if head and method.head not in ("none", head):
        raise ValueError(f"method.head: got {method.head}, {whose} has {head}; choose that, or none")
    if analytic and not method.analytic_first_step:
        raise ValueError(
            f"method.analytic_first_step: got false, {whose} takes an analytic first step; set it to true, "
            "or initialize from another student"
        )
