"""Classifier-free guidance and its variants.

A guided prediction combines a conditional and an unconditional prediction.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..config_fields import Range, check_fields
from .prediction import Row, split
from .schedule import Schedule, expand

LARGEST_SCALE = 1000


@dataclass(frozen=True)
class Guidance:
    """Guidance settings of a teacher.

    Raises ValueError for invalid settings.
    """

    scale: Annotated[
        float, Range(-LARGEST_SCALE, LARGEST_SCALE, hint="; 1 is without guidance, 3.5 is a good start")
    ] = 1.0
    """Weight w of classifier-free guidance, `m_null + w (m_cond - m_null)`; 1 is the conditional prediction alone."""

    tilt: Annotated[float, Range(-1, 1, hint="; 0 is the same scale at all times")] = 0.0
    """Change of the scale over time: (1 + tilt) times the scale at pure noise, (1 - tilt) times at clean data."""

    apg_eta: Annotated[
        float, Range(0, 1, hint="; 0 removes the parallel component (APG, less saturation), 1 is plain guidance")
    ] = 1.0
    """Share of the guidance parallel to the clean estimate that is kept (APG, arXiv 2410.02416);
    1 is plain guidance."""

    stop: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Fraction of the path to clean data that is left when guidance ends (arXiv 2404.07724); 0 guides to the end."""

    rescale: Annotated[float, Range(0, 1)] = 0.0
    """Share of the guided prediction whose standard deviation is the conditional one's (arXiv 2305.08891); 0 is off."""

    def __post_init__(self) -> None:
        check_fields(self, "guidance")

    @property
    def active(self) -> bool:
        """Whether an unconditional prediction is needed."""
        return self.scale != 1 or self.tilt != 0

    def scale_at(self, schedule: Schedule, t: Tensor) -> float | Tensor:
        """Return the guidance scale at times t.

        The scale is `scale (1 + tilt (2u - 1))` at the fraction u of the path, for t `[B]`; without a tilt
        the scale is one number.
        """
        return self.scale * (1 + self.tilt * (2 * schedule.fraction(t) - 1)) if self.tilt else self.scale

    def stopped(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return a mask of the times at which guidance has ended.

        t `[B]`; returns booleans `[B]`.
        """
        return schedule.fraction(t) <= self.stop


def guidance_of(value: "Guidance | float") -> Guidance:
    """Return a number as plain guidance, and a `Guidance` unchanged."""
    return value if isinstance(value, Guidance) else Guidance(scale=value)


def guide(
    guidance: Guidance,
    schedule: Schedule,
    row: Row,
    m_cond: Tensor,
    m_null: Tensor,
    x: Tensor,
    t: Tensor,
    patch: int = 0,
) -> Tensor:
    """Combine conditional and unconditional raw outputs into the guided output.

    `m_cond` and `m_null` [B, ...] are raw network outputs at `x` [B, ...] and t `[B]`. Guidance is affine, so
    mixing raw outputs equals mixing x0 or eps. With a `patch` other than 0, `keep_norm` follows.
    """
    scale = guidance.scale_at(schedule, t)
    if guidance.apg_eta != 1:
        x0 = split(m_cond, x, expand(schedule.alpha(t), x), expand(schedule.sigma(t), x), row).x0
        m_null = m_cond - project_guidance(m_cond - m_null, x0, guidance.apg_eta)
    m = m_null + (expand(scale, m_cond) if isinstance(scale, Tensor) else scale) * (m_cond - m_null)
    if patch:
        m = keep_norm(m, m_cond, patch)
    if guidance.rescale:
        m = rescale_guidance(m, m_cond, guidance.rescale)
    if guidance.stop:
        m = torch.where(expand(guidance.stopped(schedule, t), m) > 0, m_cond, m)
    return m


def project_guidance(difference: Tensor, x0: Tensor, eta: float) -> Tensor:
    """Scale the component of the guidance that is parallel to x0.

    Returns `d - (1 - eta) <d, x0> x0 / |x0|^2` per sample, where d is the `difference`: the share `eta` of
    the parallel component stays.

    The parallel component amplifies what is already in x0, which saturates images; the orthogonal component
    refines x0. `difference` [B, ...] may be a difference of raw outputs: at one state and time, a difference
    of raw outputs is a multiple of the difference of clean estimates.

    Source: APG (arXiv 2410.02416), without APG's momentum and norm.
    """
    along = (difference * x0).flatten(1).sum(1) / x0.square().flatten(1).sum(1).clamp(min=torch.finfo(x0.dtype).tiny)
    return difference - expand((1 - eta) * along, x0) * x0


def rescale_guidance(m: Tensor, m_cond: Tensor, share: float) -> Tensor:
    """Rescale a guided output towards the conditional standard deviation.

    Returns `share m std(m_cond) / std(m) + (1 - share) m`, with standard deviations per sample. m and m_cond
    [B, ...] are raw outputs with and without guidance.

    Source: arXiv 2305.08891, eq. 15 and 16; `guidance_rescale` in diffusers' pipelines, for models whose last
    time is pure noise.
    """
    ratio = m_cond.flatten(1).std(1) / m.flatten(1).std(1)
    return m * expand(share * ratio + (1 - share), m)


def keep_norm(m: Tensor, m_cond: Tensor, patch: int) -> Tensor:
    """Scale each patch of a guided output to the conditional one's norm.

    Returns `m |m_cond| / |m|`, with norms over all numbers of a patch of `patch` x `patch` positions.
    m and m_cond [B, C, H, W] are raw outputs with and without guidance.

    Source: `QwenImagePipeline` in diffusers, whose tokens are such patches.
    """
    own, cond = (pixel_unshuffle(y, patch) for y in (m, m_cond))
    norm = own.norm(dim=1, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)
    return pixel_shuffle(own * (cond.norm(dim=1, keepdim=True) / norm), patch)
