"""Adversarial losses of the discriminator and the student.

The discriminator separates diffused real data from diffused student samples (TDM eq. 16).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # logits [B, N] -> per sample [B]


class GanLoss(NamedTuple):
    """Losses that the discriminator and the student minimise.

    The discriminator minimises `real` on real data and `fake` on student samples; the student minimises
    `student`. Logits are positive where the discriminator takes data for real.
    """

    real: Logits
    fake: Logits
    student: Logits


GAN_LOSSES: dict[str, GanLoss] = {
    "hinge": GanLoss(lambda d: F.relu(1 - d).mean(1), lambda d: F.relu(1 + d).mean(1), lambda d: -d.mean(1)),
    "non-saturating": GanLoss(
        lambda d: F.softplus(-d).mean(1), lambda d: F.softplus(d).mean(1), lambda d: F.softplus(-d).mean(1)
    ),
}


def gradient_penalty(gradients: list[Tensor]) -> Tensor:
    """Return the R1 penalty of the discriminator per sample.

    R1 is `||grad||^2 / 2`. `gradients` are the gradients [B, ...] of the logits of real data, one tensor per
    input; returns [B].

    Source: arXiv 1801.04406.
    """
    return sum((g.square().flatten(1).sum(1) for g in gradients[1:]), gradients[0].square().flatten(1).sum(1)) / 2
