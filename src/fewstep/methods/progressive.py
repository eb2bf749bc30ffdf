"""Progressive distillation (arXiv 2202.00512).

One student step lands where two steps of the previous stage land.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..config_fields import POSITIVE, OneOf, Range
from ..core import timegrid
from ..core.schedule import diffuse
from ..core.solvers import Denoise, ddim_step
from ..core.weighting import WEIGHTINGS
from ..objectives.regression import REGRESSION_LOSSES, landing_target
from ..roles.roles import Roles
from ..transfer import sent
from ..words import speaks_python
from .method import MOST_STEPS, Loss, Method, Needs, TrainBatch
from .names import require_name


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation(Method):
    """Settings of progressive distillation, in stages of equal length.

    Raises ValueError for invalid settings.
    """

    name: str = "progressive"

    loss: Annotated[str, OneOf(REGRESSION_LOSSES)] = "l2"
    """Regression loss."""

    stages: Annotated[int, Range(1, MOST_STEPS)] = 3
    """Stages, each of which halves the number of steps; the last one has `steps`."""

    weight: Annotated[str, OneOf(WEIGHTINGS)] = "own"
    """Weighting over time; `own` weights errors as those of the network's own output."""

    snr_clip: Annotated[float, POSITIVE] = 5.0
    """Largest weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_name(self)
        if len(self.counts) > 1:
            raise ValueError(
                f"method.steps: got {list(self.counts)}, method {self.name} makes students of one step count; "
                "choose one"
            )

    @property
    def needs(self) -> Needs:
        """What the method needs besides student, teacher and prompts.

        Images, and the student of the previous stage as the fake role.
        """
        return Needs(fake=True, images=True, length=True)

    @property
    def separate(self) -> bool:
        return True

    def losses(self, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        value = progressive_loss(self, roles, batch)
        yield Loss("student", value, {"student_loss": value.detach()})


def stage_of(method: ProgressiveDistillation, iteration: int, iterations: int) -> tuple[int, bool]:
    """Return the stage of an iteration.

    Returns (stage, whether the stage begins at this iteration). Stages are of equal length.
    """
    stage = min(method.stages - 1, iteration * method.stages // max(iterations, 1))
    return stage, iteration > 0 and stage > 0 and stage != min(
        method.stages - 1, (iteration - 1) * method.stages // iterations
    )


def progressive_loss(method: ProgressiveDistillation, roles: Roles, batch: TrainBatch) -> Tensor:
    """Return the weighted regression on the previous stage.

    The target is the clean estimate whose one step lands where two steps of the previous stage land. The
    previous stage is the guided teacher, then the averaged student at the beginning of the stage, kept as the
    `fake` role.
    """
    assert batch.images is not None
    schedule, rng, (x_0, cond) = roles.backbone.schedule, batch.rng, batch.images
    stage, begins = stage_of(method, batch.iteration, batch.iterations)
    if begins:
        roles.keep_average_as_fake()
    guided = roles.teacher(cond, batch.null, method.guidance)
    before: Denoise = roles.denoise("fake", cond) if stage else guided
    steps = method.counts[0] * 2 ** (method.stages - 1 - stage)
    fine = timegrid.uniform(schedule, 2 * steps, method.shift)
    segment = timegrid.draw_segments(batch.batch, steps, batch.host_rng).cpu()
    high, middle, low = sent(torch.stack([fine[2 * segment + i] for i in range(3)]), rng.device)
    x = diffuse(schedule, x_0, high, torch.randn(x_0.shape, generator=rng, device=rng.device))
    with torch.no_grad():
        x_middle = ddim_step(schedule, before(x, high), middle)
        x_low = ddim_step(schedule, before(x_middle, middle), low)
        goal = landing_target(schedule, x, x_low, high, low)
    own = roles.denoise("student", cond)(x, high).x0
    weight = WEIGHTINGS[method.weight](schedule, roles.backbone.row, high, method.snr_clip)
    return (weight.to(own) * REGRESSION_LOSSES[method.loss](own, goal)).mean()
