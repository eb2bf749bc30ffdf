"""Weights over time for regressions on x0."""

from torch import Tensor

from .schedule import Schedule


def min_snr(schedule: Schedule, t: Tensor, clip: float = 5.0) -> Tensor:
    """`min(alpha^2/sigma^2, clip)` (arXiv 2303.09556), [B], float64. Unclipped x0 regression lets low noise dominate."""
    return (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2).clamp(max=clip)
