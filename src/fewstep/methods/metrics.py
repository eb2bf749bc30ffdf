"""Metrics of an iteration: names and meaning.

The names stay the same through a run.
"""

import math
from collections.abc import Mapping

from ..roles.roles import Roles
from .method import Method

MEANING = {
    "student_loss": (
        "what the student is trained on: of distribution matching its size says little, of imitation it is the "
        "distance to the teacher"
    ),
    "fake_loss": "how far the fake score is from the student's samples; in progressive distillation there is none",
    "discriminator_loss": "of the adversarial term's discriminator (gan)",
    "gan_loss": "the student's side of the adversarial term, before its weight",
    "regression_loss": (
        "how far the student lands from the teacher's trajectories, before its weight (regression_weight)"
    ),
    "reward": "mean reward of the student's images (reward): of their clean estimates, or of whole samples",
    "surrogate_loss": "of the network that learns a reward from preferences; below its start, ln 2 / strength, it has",
    "absorb_loss": "how far the student lands from where its head took it, while the head is absorbed",
    "gap_K": (
        "rms difference of the teacher's and the fake score's clean estimates in segment K, 0 at pure noise; "
        "grows first when a run goes wrong"
    ),
    "gap_N_K": "the same for a student of several step counts, in N steps",
    "student_grad, fake_grad, reward_grad, discriminator_grad": (
        "gradient norms before clipping, of the last update of the iteration"
    ),
}


def metric_names(method: Method, roles: Roles) -> tuple[str, ...]:
    """Return the names of all metrics that a method may log.

    The order is that of `MEANING`.
    """
    absorbed = ("absorb_loss",) if roles.head_to_absorb is not None else ()
    return (*method.metrics, *absorbed, *(f"{role}_grad" for role in method.updated if role in roles.trained))


def filled(metrics: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Return the metrics under all names, NaN where missing.

    Metrics of the method outside `names` are kept.
    """
    return {n: metrics.get(n, math.nan) for n in names} | {n: v for n, v in metrics.items() if n not in names}
