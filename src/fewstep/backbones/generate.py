"""From prompts and seeds to pictures: the same noise as diffusers, any network, any deterministic solver."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.solvers import Denoise, State, Update, ddim, sample
from .base import Backbone


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def starting_noise(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """One state of pure noise per seed, [len(seeds), ...], drawn on the CPU as diffusers draws it from a generator of that seed.

    A seed gives the same picture in any batch and on any device.
    """
    noise = [torch.randn((1, *backbone.shape), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(noise).to(device_of(backbone.module)) * backbone.schedule.start_std


def trajectory(backbone: Backbone, denoise: Denoise, seeds: Sequence[int], times: Tensor, update: Update = ddim) -> list[State]:
    """All K + 1 states from these seeds, without gradient."""
    with torch.no_grad():
        return list(sample(denoise, backbone.schedule, starting_noise(backbone, seeds), times, update))


def pictures(backbone: Backbone, denoise: Denoise, seeds: Sequence[int], times: Tensor, update: Update = ddim) -> Tensor:
    """Decoded final states, [len(seeds), 3, H, W] in [0, 1] (or plain points for backbones without a picture)."""
    return backbone.decode(trajectory(backbone, denoise, seeds, times, update)[-1].x)
