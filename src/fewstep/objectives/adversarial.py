"""A discriminator between diffused real data and diffused student samples, and the student's loss against it. TDM eq. 16."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # logits [B, N] -> per sample [B]


class GanLoss(NamedTuple):
    """What each side minimises; logits are positive where the discriminator believes in real data."""

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
    """R1, `||grad||^2 / 2` per sample (arXiv 1801.04406): gradients [B, ...] of the logits of real data, one per input; returns [B]."""
    return sum((g.square().flatten(1).sum(1) for g in gradients[1:]), gradients[0].square().flatten(1).sum(1)) / 2
