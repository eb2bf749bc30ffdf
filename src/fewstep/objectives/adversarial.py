"""A discriminator between diffused real data and diffused student samples, and the student's loss against it. TDM eq. 16."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # logits [B, N] -> per sample [B]


class Game(NamedTuple):
    """What each side minimises; logits are positive where the discriminator believes in real data."""

    real: Logits
    fake: Logits
    student: Logits


GAMES: dict[str, Game] = {
    "hinge": Game(lambda d: F.relu(1 - d).mean(1), lambda d: F.relu(1 + d).mean(1), lambda d: -d.mean(1)),
    "non-saturating": Game(lambda d: F.softplus(-d).mean(1), lambda d: F.softplus(d).mean(1), lambda d: F.softplus(-d).mean(1)),
}


def game_named(name: str) -> Game:
    """A game by name. Raises ValueError listing the known ones."""
    if name not in GAMES:
        raise ValueError(f"method.gan_loss: got {name!r}, allowed are {', '.join(GAMES)}")
    return GAMES[name]


def gradient_penalty(gradients: list[Tensor]) -> Tensor:
    """R1, `||grad||^2 / 2` per sample (arXiv 1801.04406): gradients [B, ...] of the logits of real data, one per input; returns [B]."""
    return sum((g.square().flatten(1).sum(1) for g in gradients[1:]), gradients[0].square().flatten(1).sum(1)) / 2
