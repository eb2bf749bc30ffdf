"""Appearance of images: brightness, saturation, contrast and sharpness.

Every function takes images [P, 3, H, W] or clips [P, F, 3, H, W] in [0, 1], and returns one number for each: [P].
"""

import torch
from torch import Tensor

FLAT = 1e-4  # deviation of grey values below which an image has no edges to be sharp


def brightness(images: Tensor) -> Tensor:
    """Return the mean of all pixels and channels."""
    return images.flatten(1).mean(1)


def saturation(images: Tensor) -> Tensor:
    """Return the mean over pixels of the largest minus the smallest channel."""
    return (images.amax(-3) - images.amin(-3)).flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    """Return the standard deviation of the grey values, the mean over channels."""
    return images.mean(-3).flatten(1).std(1)


def sharpness(images: Tensor) -> Tensor:
    """Return the share of fine detail in the contrast.

    `rms(L g) / std(g)` of the grey values g, where L subtracts from each pixel the mean of its four neighbours.
    Brightness and contrast do not change it; blur lowers it, noise raises it. An image of one colour, or of
    fewer than 3 x 3 pixels, has 0.
    """
    grey, spread = images.mean(-3), contrast(images)
    if min(grey.shape[-2:]) < 3:
        return torch.zeros_like(spread)
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    detail = (inner - around / 4).flatten(1).square().mean(1).sqrt()
    return torch.where(spread > FLAT, detail / spread.clamp(min=FLAT), torch.zeros_like(spread))
