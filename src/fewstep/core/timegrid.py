"""Time grids of students, and times drawn inside one segment."""

import torch
from torch import Tensor

from .schedule import Schedule

NEAR = 1e-6  # of the path: the rounding of a time


def uniform(schedule: Schedule, steps: int, shift: float = 1.0) -> Tensor:
    """Return the uniform K-step time grid.

    The grid is `t_i = (T/K) i` for i = K .. 0 (TDM sec. 3.2): `[K + 1]`, float64, decreasing, ending at clean
    data. On a table of 1000 times and K = 4 the grid is 999, 749, 499, 249, -1 (clean); with EDM's schedule
    the grid is even in the seventh root. A `shift` s moves the fraction u = i/K to `s u / (1 + (s - 1) u)`,
    towards noise for s > 1.

    Raises ValueError for fewer than one step, or for more steps than the table has.
    """
    most = int(schedule.t_max - schedule.t_clean) if schedule.resolution else 10_000
    if not 1 <= steps <= most:
        raise ValueError(f"steps: got {steps}, allowed are 1 to {most}; few-step students use 1 to 8")
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return time_at(schedule, shift * u / (1 + (shift - 1) * u))


def random(schedule: Schedule, steps: int, generator: torch.Generator) -> Tensor:
    """Return a K-step time grid with random inner times.

    The K - 1 inner fractions of the path are independent and uniform; on a table they are different times.
    `[K + 1]`, float64, decreasing, from pure noise to clean data.

    Source: CDM, arXiv 2605.06376.
    """
    u = torch.rand(steps - 1, generator=generator, dtype=torch.float64, device=generator.device).cpu().sort().values
    if schedule.resolution:
        # Ordered draws from the first T - K + 1 times, each moved up by its place, are different.
        levels = round((schedule.t_max - schedule.t_clean) / schedule.resolution)
        u = ((u * (levels - steps + 1)).floor() + torch.arange(1, steps)) / levels
    return time_at(schedule, torch.cat([torch.ones(1), u.flip(0), torch.zeros(1)]).double())


def between(schedule: Schedule, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return times that part a stretch of the path evenly.

    From `start` to a cleaner `end` ([] each): `[steps + 1]`, float64, decreasing; on a table fewer where it has fewer.
    """
    u = torch.linspace(float(schedule.fraction(start)), float(schedule.fraction(end)), steps + 1, dtype=torch.float64)
    return torch.cat([start[None], time_at(schedule, u[1:-1]), end[None]]).double().unique_consecutive()


def even(schedule: Schedule, times: Tensor) -> bool:
    """Return whether a grid equals the uniform grid of its length."""
    return torch.allclose(times.double(), uniform(schedule, len(times) - 1), rtol=1e-9, atol=1e-9)


def time_at(schedule: Schedule, u: Tensor) -> Tensor:
    """Return the network's time nearest to the fraction u.

    u is a fraction of the path from clean data to pure noise; the time is float64.
    """
    t = schedule.at(u)
    return schedule.t_clean + (t - schedule.t_clean).round() if schedule.resolution else t


def check(schedule: Schedule, times: Tensor) -> Tensor:
    """Check that `times` is a grid of this schedule.

    A grid is decreasing and ends at clean data. Returns the grid; raises ValueError for any other times.
    """
    if (
        times.ndim != 1
        or len(times) < 2
        or not bool((times.diff() < 0).all())
        or times[-1] != schedule.t_clean
        or times[0] > schedule.t_max
    ):
        raise ValueError(
            f"times: got {times.tolist()}, allowed are decreasing times from at most {schedule.t_max:g}, the last "
            f"one {schedule.t_clean:g} (clean)"
        )
    return times


def draw_segments(batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw the segment that each sample trains on.

    Returns `[B]` in 0 .. K-1, sorted, evenly distributed; segment 0 starts from noise. The draw is
    stratified: every segment gets B/K samples and the remainder is random, so no batch misses a segment by
    chance.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return ((torch.arange(batch, device=generator.device) + offset) * steps / batch).floor().long().clamp(max=steps - 1)


def segments_at(times: Tensor, t: Tensor) -> Tensor:
    """Return the segment of a grid in which each time lies.

    Segment k of `times [K + 1]` holds the times `(t_{k+1}, t_k]`; noisier ones are in the first, and clean data in the
    last. `t [B]` is on any device, and the result `[B]`, 0 .. K-1, is there, too. Times that are rounded to single
    precision stay in their segment.
    """
    near = NEAR * float(times[0] - times[-1])
    found = torch.zeros_like(t, dtype=torch.long)
    for inner in times[1:-1].tolist():
        found += t <= inner + near
    return found


def draw_between(schedule: Schedule, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one time in `(low, high]` per sample.

    Times are even in the schedule's own measure and lie on the network's times. low, high [B], float64.
    """
    u = 1 - torch.rand(low.shape, generator=generator, dtype=torch.float64, device=low.device)
    bottom, top = schedule.fraction(low), schedule.fraction(high)
    t = schedule.at(bottom + u * (top - bottom))
    if schedule.resolution:
        t = torch.ceil(t - 1e-6).maximum(low + schedule.resolution)
    return t.minimum(high)
