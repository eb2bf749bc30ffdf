"""Rewards beside matching: scores of images that the student is to raise.

A differentiable reward r adds `-w r(x0_hat)` to the student's loss, and its gradient flows through the one step of
that loss. Any other reward is learnt from preferences first, as TDM-R1 does (arXiv 2603.07700): a surrogate, a third
network that starts as the teacher, denoises better what is preferred. Images of one prompt are a group. They come
from deterministic trajectories, so the score of an image belongs to every state on the way to it. All states of a
group are diffused to one tau by the same noise. The surrogate's clean estimate minus the teacher's is then the
direction of the reward in a state, as the guided minus the unguided one is that of guidance.

Left out of public code: clipping of the surrogate's update, its pull back to the teacher, and guidance of the
surrogate. The loss here saturates by itself, the sooner the larger `strength` is.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..core.appearance import brightness, contrast, saturation, sharpness

Reward = Callable[[Tensor, Sequence[str]], Tensor]  # (images [B, 3, H, W] in [0, 1], prompts) -> [B]
LARGEST_ADVANTAGE = 5.0


def _of_images(score: Callable[[Tensor], Tensor]) -> Reward:
    return lambda images, prompts: score(images)


# Differentiable rewards by name.
REWARDS: dict[str, Reward] = {
    "brightness": _of_images(brightness),
    "contrast": _of_images(contrast),
    "saturation": _of_images(saturation),
    "sharpness": _of_images(sharpness),
}


def advantages(rewards: Tensor, group: int) -> Tensor:
    """Return what each reward has over its group's mean.

    `(r - mean_group) / std`, within 5 standard deviations of all rewards. rewards [B], of which `group` neighbours
    belong together; returns [B].
    """
    grouped = rewards.view(-1, group)
    apart = (grouped - grouped.mean(1, keepdim=True)).flatten()
    return (apart / (rewards.std(correction=0) + 1e-4)).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)


def group_preference(errors: Tensor, reference: Tensor, advantage: Tensor, group: int, strength: float) -> Tensor:
    """Return the loss of a surrogate's preference per group.

    `-log sigmoid(-beta mean_i A_i (e_i - e_i_ref)) / beta`: denoising errors fall below the teacher's where the
    advantage is positive, and rise where it is negative. The gradient fades once `beta` times the mean is below -1.

    errors [B] carry the gradient; the teacher's errors `reference` [B] and `advantage` [B] are constants; returns
    [B / group].

    Source: direct group preference optimization, arXiv 2510.08425.
    """
    gain = (advantage.detach() * (errors - reference.detach())).view(-1, group).mean(1)
    return F.softplus(strength * gain) / strength
