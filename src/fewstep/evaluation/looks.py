"""Appearance of images, which is compared with the teacher's."""

import torch
from torch import Tensor

from ..core.appearance import brightness, contrast, saturation, sharpness
from .motion import motion

# Columns of `looks`: of images brightness to sharpness and motion, of states the mean and the standard deviation.
LOOKS = ("brightness", "saturation", "contrast", "sharpness", "motion", "state_mean", "state_std")


def looks(images: Tensor, states: Tensor | None = None) -> Tensor:
    """Return the appearance [B, 7] of images, in the order of `LOOKS`.

    images [B, 3, H, W], or clips [B, F, 3, H, W], in [0, 1]; `states` [B, ...] are those that the images were
    decoded from. Without states the images stand for them, as they do in a pixel model. Images do not move: their
    motion is 0.
    """
    clips = images.ndim == 5 and images.shape[1] > 1
    moved = motion(images) if clips else images.new_zeros(len(images))
    flat = (images if states is None else states).float().flatten(1)
    columns = [brightness(images), saturation(images), contrast(images), sharpness(images), moved]
    return torch.stack([*columns, flat.mean(1), flat.std(1)], 1)


def column(table: Tensor, name: str) -> Tensor:
    """Return one column [B] of `looks` [B, 7]."""
    return table[:, LOOKS.index(name)]
