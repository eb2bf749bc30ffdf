"""Image autoencoders of all families.

Latents of images, images of latents, and the scale of latents.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLQwenImage21
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

PATCH = 2  # side of the patches that FLUX.2's autoencoder folds into channels


def latents_of(vae: Any, images: Tensor) -> Tensor:
    """Return the means of an autoencoder's posterior, unscaled.

    `images` [B, 3, H, W] are in [-1, 1]. Latents are [B, C, h, w]: FLUX.2's with patches of 2 x 2 folded
    into channels. A video autoencoder gets one frame, one with an alpha channel opaque images.
    """
    if isinstance(vae, AutoencoderKLQwenImage21):
        images = pad(images, (0, 0, 0, 0, 0, 1), value=1.0)
    if isinstance(vae, AutoencoderKLQwenImage | AutoencoderKLQwenImage21):
        frame: Tensor = vae.encode(images.unsqueeze(2)).latent_dist.mean.squeeze(2)
        return frame
    means: Tensor = vae.encode(images).latent_dist.mean
    return pixel_unshuffle(means, PATCH) if isinstance(vae, AutoencoderKLFlux2) else means


def images_of(vae: Any, latents: Tensor) -> Tensor:
    """Return images [B, 3, H, W] in [-1, 1] of unscaled latents.

    The inverse of `latents_of`; what an alpha channel leaves through is white.
    """
    if isinstance(vae, AutoencoderKLQwenImage | AutoencoderKLQwenImage21):
        frame: Tensor = vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)
        return frame if frame.shape[1] == 3 else 2 * over_white(frame / 2 + 0.5) - 1
    if isinstance(vae, AutoencoderKLFlux2):
        latents = pixel_shuffle(latents, PATCH)
    drawn: Tensor = vae.decode(latents, return_dict=False)[0]
    return drawn


def over_white(images: Tensor) -> Tensor:
    """Return images with an alpha channel as they look over white.

    Images [B, 4, H, W] are in [0, 1], and cut there before. Those [B, 3, H, W] come back unchanged.
    """
    if images.shape[-3] == 3:
        return images
    colours, alpha = images.clamp(0, 1).split([3, 1], -3)
    return 1 - alpha + alpha * colours


def scale_of(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return `(shift, scale)` of states `(z - shift) scale` for latents z.

    Two numbers, or two tensors [1, C, 1, 1] where channels are normalised one by one.
    """
    config = vae.config
    if isinstance(vae, AutoencoderKLFlux2):
        mean, variance = (
            v.detach().float().to(like.device).view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (variance + config.batch_norm_eps).rsqrt()
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, std = (
        torch.tensor(v, device=like.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    return mean, config.get("scaling_factor", 1.0) / std
