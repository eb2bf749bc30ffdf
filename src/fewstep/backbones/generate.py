"""From prompts and seeds to pictures: the same noise as diffusers, any network, any deterministic solver."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.prediction import Split
from ..core.rollout import DenoiseRows
from ..core.solvers import Correction, Denoise, State, sample, solver_named
from .base import Backbone


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


SEEDS = 2**62  # torch's generators take 64 bits, and seeds are counted up from what is asked for


def require_seed(seed: int, option: str) -> int:
    """The same. Raises ValueError where no generator takes it."""
    if not -SEEDS <= seed < SEEDS:
        raise ValueError(f"{option}: got {seed}, allowed are whole numbers from -2^62 up to, not including, 2^62")
    return seed


def noise_of(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """The next state of noise of each generator, [len(generators), *shape], on the CPU: as diffusers draws from a list of generators."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def trajectory(
    backbone: Backbone,
    denoise: Denoise,
    seeds: Sequence[int],
    times: Tensor,
    solver: str = "ddim",
    correct: Correction | None = None,
) -> list[State]:
    """All K + 1 states from these seeds, without gradient. A seed gives the same picture in any batch and on any device."""
    device = device_of(backbone.module)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    x = noise_of(generators, backbone.shape).to(device) * backbone.schedule.start_std
    rule = solver_named(solver, lambda like: noise_of(generators, like.shape[1:]).to(like))
    with torch.no_grad():
        return list(sample(denoise, backbone.schedule, x, times, rule, correct))


def in_parts(denoise_rows: DenoiseRows, size: int) -> Denoise:
    """A denoiser that asks its network about `size` rows at a time: as many pictures as one likes in the memory of a few."""

    def denoise(x: Tensor, t: Tensor) -> Split:
        parts = [
            denoise_rows(rows)(x[rows], t[rows])
            for rows in (slice(i, min(i + size, len(x))) for i in range(0, len(x), size))
        ]
        return Split(torch.cat([p.x0 for p in parts]), torch.cat([p.eps for p in parts]))

    return denoise


def pictures(
    backbone: Backbone,
    denoise: Denoise,
    seeds: Sequence[int],
    times: Tensor,
    solver: str = "ddim",
    correct: Correction | None = None,
) -> Tensor:
    """Decoded final states, [len(seeds), 3, H, W] in [0, 1] (or plain points for backbones without a picture)."""
    return backbone.decode(trajectory(backbone, denoise, seeds, times, solver, correct)[-1].x)
