"""The student's own trajectory: roll out to a drawn segment without gradient, and take that one step with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Split
from .schedule import Schedule
from .solvers import DDIM, Correct, Denoise, Past, Solver, Visit, step

DenoiseRows = Callable[[slice], Denoise]  # the denoiser under the conditions of these rows of the batch


def segment_starts(
    denoise_rows: DenoiseRows,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    segments: Tensor,
    solver: Solver = DDIM,
    correct: Correct | None = None,
    calls: int = 0,
) -> tuple[Tensor, Past]:
    """States at the noisy end of each sample's segment, `x_{t_{m+1}}` [B, ...], and their past; without gradient.

    x [B, ...] at times[0]; segments [B], sorted ascending, 0 starts from noise. Only the samples that have further
    to go are evaluated, so a batch spread evenly over K segments costs (K - 1)/2 network calls, not K - 1; where nobody has, one is
    until there were so many `calls`, for a network that several processes have to call together. The past is what a
    multistep solver or a correction needs for the next step.
    """
    x, noise = x.clone(), x / schedule.start_std
    visits = [_none(schedule, x) for _ in range(solver.memory if correct is None else len(times) - 2)]
    with torch.no_grad():
        for k in range(int(segments.max())):
            rows = slice(int((segments <= k).sum()), None)
            t, t_next = (s.to(x.device).expand(len(x[rows])) for s in (times[k], times[k + 1]))
            here, past = denoise_rows(rows)(x[rows].clone(), t), _rows(Past(noise, visits), rows)
            x[rows], visit = step(solver, schedule, here, t, t_next, past, correct)
            for older, newer in zip(visits[::-1], [*past.visits[-2::-1], visit] if visits else [], strict=True):
                _put(older, rows, newer)
        for k in range(int(segments.max()), calls):
            denoise_rows(slice(0, 1))(x[:1], times[k].to(x.device).expand(1))
    return x, Past(noise, visits)


def _none(schedule: Schedule, x: Tensor) -> Visit:
    """A visit that is nobody's: at clean data."""
    t = torch.full((len(x),), schedule.t_clean, dtype=torch.float64, device=x.device)
    return Visit(t, *(Split(torch.zeros_like(x), torch.zeros_like(x)) for _ in range(2)))


def _rows(past: Past, rows: slice) -> Past:
    """Copies of what belongs to these rows."""
    visits = [Visit(v.t[rows].clone(), *(Split(*(p[rows].clone() for p in s)) for s in (v.here, v.way))) for v in past.visits]
    return Past(past.noise[rows], visits)


def _put(into: Visit, rows: slice, visit: Visit) -> None:
    into.t[rows] = visit.t
    for mine, other in ((into.here, visit.here), (into.way, visit.way)):
        mine.x0[rows], mine.eps[rows] = other.x0, other.eps
