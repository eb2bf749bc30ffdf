"""Sampling images from prompts and seeds.

The initial noise is that of diffusers. Any network and any solver can be used.
"""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..core.prediction import Split
from ..core.rollout import DenoiseRows
from ..core.solvers import Correction, Denoise, State, sample, solver_named
from .base import Backbone


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a network."""
    return next(module.parameters()).device


SEEDS = 2**62  # torch's generators take 64 bits, and seeds are counted up from the first one


def require_seed(seed: int, option: str) -> int:
    """Return `seed` if torch's generators take it.

    Raises ValueError otherwise, with the name of the `option`.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -SEEDS <= int(seed) < SEEDS:
        raise ValueError(f"{option}: got {seed}, allowed are whole numbers from -2^62 up to, not including, 2^62")
    return int(seed)


def noise_of(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Sample one state of standard noise per generator.

    Returns [len(generators), *shape] on the CPU: the noise that diffusers samples from a list of
    generators.
    """
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def trajectory(
    backbone: Backbone,
    denoise: Denoise,
    seeds: Sequence[int],
    times: Tensor,
    solver: str = "ddim",
    correct: Correction | None = None,
) -> list[State]:
    """Return all K + 1 states from these seeds, without gradient.

    A seed gives the same image in any batch and on any device.
    """
    device = device_of(backbone.module)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    x = noise_of(generators, backbone.shape).to(device) * backbone.schedule.start_std
    rule = solver_named(solver, lambda like: noise_of(generators, like.shape[1:]).to(like))
    with torch.no_grad():
        return list(sample(denoise, backbone.schedule, x, times, rule, correct))


def in_parts(denoise_rows: DenoiseRows, size: int) -> Denoise:
    """Return a denoiser that evaluates `size` rows at a time.

    Any number of images then takes the memory of `size` images.
    """

    def denoise(x: Tensor, t: Tensor) -> Split:
        parts = [
            denoise_rows(rows)(x[rows], t[rows])
            for rows in (slice(i, min(i + size, len(x))) for i in range(0, len(x), size))
        ]
        return Split(torch.cat([p.x0 for p in parts]), torch.cat([p.eps for p in parts]))

    return denoise


def sample_images(
    backbone: Backbone,
    denoise: Denoise,
    seeds: Sequence[int],
    times: Tensor,
    solver: str = "ddim",
    correct: Correction | None = None,
) -> Tensor:
    """Return the decoded final states of these seeds.

    Images are [len(seeds), 3, H, W] in [0, 1]. Backbones without images return their own data, such as
    points.
    """
    return backbone.decode(trajectory(backbone, denoise, seeds, times, solver, correct)[-1].x)
