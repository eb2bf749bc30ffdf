"""The student's own trajectory: roll out to a drawn segment without gradient, and take that one step with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import Schedule
from .solvers import Denoise, Estimate, Update, ddim

DenoiseRows = Callable[[slice], Denoise]  # the denoiser under the conditions of these rows of the batch


def segment_starts(
    denoise_rows: DenoiseRows, schedule: Schedule, noise: Tensor, times: Tensor, segments: Tensor, update: Update = ddim
) -> tuple[Tensor, Estimate]:
    """States at the noisy end of each sample's segment, `x_{t_{m+1}}` [B, ...], and the estimate before; without gradient.

    noise [B, ...] at times[0]; segments [B], sorted ascending, 0 starts from noise. Only the samples that have further
    to go are evaluated, so a batch spread evenly over K segments costs (K - 1)/2 network calls, not K - 1. The estimate is
    what a multistep update needs for the next step; of a sample that has not moved its time is times[0].
    """
    x = noise.clone()
    before = Estimate(times[0].to(x.device).repeat(len(x)), torch.zeros_like(x))
    with torch.no_grad():
        for k in range(int(segments.max())):
            rows = slice(int((segments <= k).sum()), None)
            t, t_next = (s.to(x.device).expand(len(x[rows])) for s in (times[k], times[k + 1]))
            here = denoise_rows(rows)(x[rows], t)
            x[rows] = update(schedule, here, t, t_next, Estimate(before.t[rows], before.x0[rows]))
            before.t[rows], before.x0[rows] = t, here.x0
    return x, before
