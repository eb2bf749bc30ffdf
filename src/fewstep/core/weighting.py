"""Weights over time for regressions on x0."""

from collections.abc import Callable

from torch import Tensor

from .schedule import Schedule


def min_snr(schedule: Schedule, t: Tensor, clip: float = 5.0) -> Tensor:
    """`min(alpha^2/sigma^2, clip)` (arXiv 2303.09556), [B], float64. Unclipped x0 regression lets low noise dominate."""
    return (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2).clamp(max=clip)


def truncated_v(schedule: Schedule, t: Tensor, clip: float = 5.0) -> Tensor:
    """`min(alpha^2/sigma^2 + 1, clip)`: the v-prediction loss in x0 terms, clipped like min-SNR; [B], float64.

    Unlike min-SNR it does not vanish at zero terminal SNR, where a few-step student takes its first step.
    """
    return (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2 + 1).clamp(max=clip)


Weighting = Callable[[Schedule, Tensor, float], Tensor]
WEIGHTINGS: dict[str, Weighting] = {"min-snr": min_snr, "v": truncated_v}


def weighting_named(name: str) -> Weighting:
    """A weighting by name. Raises ValueError listing the known ones."""
    if name not in WEIGHTINGS:
        raise ValueError(f"method.fake_weight: got {name!r}, allowed are {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]
