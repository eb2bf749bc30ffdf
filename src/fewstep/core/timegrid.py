"""Where a student stops: K-step grids, and times drawn inside one of their segments."""

import torch
from torch import Tensor

from .schedule import Schedule


def uniform(schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
    """`t_i = (T/K) i` for i = K .. 0, the stated grid of TDM sec. 3.2; `[K + 1]`, float64, decreasing, ends clean.

    On a table of 1000 times and K = 4: 999, 749, 499, 249, -1 (clean). `shift` s moves the fraction u = i/K to
    `s u / (1 + (s - 1) u)`, towards noise for s > 1. Raises ValueError for fewer than one step or more than the table has.
    """
    span = schedule.t_max - schedule.t_clean
    most = int(span) if schedule.resolution else 10_000
    if not 1 <= steps <= most:
        raise ValueError(f"steps: got {steps}, allowed are 1 to {most}; few-step students use 1 to 8")
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    passed = span * (shift * u / (1 + (shift - 1) * u))
    return schedule.t_clean + (passed.round() if schedule.resolution else passed)


def karras(schedule: Schedule, steps: int, t_min: float, rho: float = 7.0) -> Tensor:
    """EDM's grid (eq. 5) from t_max to t_min, then clean: `[K + 1]`, float64. For schedules with sigma = t."""
    if steps == 1:
        return torch.tensor([schedule.t_max, schedule.t_clean], dtype=torch.float64)
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    hi, lo = schedule.t_max ** (1 / rho), t_min ** (1 / rho)
    return torch.cat([(hi + u * (lo - hi)) ** rho, torch.tensor([schedule.t_clean], dtype=torch.float64)])


def check(schedule: Schedule, times: Tensor) -> Tensor:
    """`times` if it is a grid of this schedule: decreasing, ending clean. Raises ValueError otherwise."""
    if (
        times.ndim != 1
        or len(times) < 2
        or not bool((times.diff() < 0).all())
        or times[-1] != schedule.t_clean
        or times[0] > schedule.t_max
    ):
        raise ValueError(
            f"times: got {times.tolist()}, allowed are decreasing times from at most {schedule.t_max:g}, the last one {schedule.t_clean:g} (clean)"
        )
    return times


def draw_segments(batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Which segment each sample trains on, `[B]` in 0 .. K-1 (0 starts from noise), sorted, drawn evenly.

    Stratified: every segment gets B/K samples, the rest at random, so that no batch leaves a segment out by chance.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return ((torch.arange(batch, device=generator.device) + offset) * steps / batch).floor().long().clamp(max=steps - 1)


def draw_between(schedule: Schedule, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """A time in `(low, high]` per sample, uniform, on the network's own times. low, high [B], float64."""
    u = 1 - torch.rand(low.shape, generator=generator, dtype=torch.float64, device=low.device)
    t = low + u * (high - low)
    return torch.ceil(t) if schedule.resolution else t
