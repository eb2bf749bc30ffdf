"""Rollout of the student's own trajectory to a drawn segment.

The rollout to the segment has no gradient. The caller takes the step of the segment with gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Split
from .schedule import Schedule
from .solvers import DDIM, Correction, Denoise, Solver, SolverHistory, SolverStep, at_time, step

DenoiseRows = Callable[[slice], Denoise]  # rows of the batch -> denoiser under their conditions
DenoiseStep = Callable[[int, slice], Denoise]  # step, rows of the batch -> denoiser of the step


def segment_starts(
    denoise_step: DenoiseStep,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    segments: Tensor,
    solver: Solver = DDIM,
    correct: Correction | None = None,
    calls: int = 0,
) -> tuple[Tensor, SolverHistory]:
    """Return the states at the noisy end of each sample's segment.

    Returns `x_{t_{m+1}}` [B, ...] and the samples' history, both without gradient. Multistep solvers and
    corrections need the history for the next step.

    x [B, ...] at times[0]; segments [B], sorted ascending; segment 0 starts from noise. Times and segments are
    on the CPU, because segments decide how many samples a step has. Only samples with
    steps left are evaluated, so a batch spread evenly over K segments costs `(K - 1)/2` network calls per
    sample, not `K - 1`. With `calls`, one-sample dummy calls pad the rollout to a fixed number of forward
    passes, as FSDP requires. `denoise_step` is told the step, 0 at pure noise.
    """
    x, noise = x.clone(), x / schedule.start_std
    steps = [_no_step(schedule, x) for _ in range(solver.memory if correct is None else len(times) - 2)]
    with torch.no_grad():
        for k in range(int(segments.max())):
            rows = slice(int((segments <= k).sum()), None)
            t, t_next = (at_time(s, x[rows]) for s in (times[k], times[k + 1]))
            pred, history = denoise_step(k, rows)(x[rows].clone(), t), _rows(SolverHistory(noise, steps), rows)
            x[rows], done = step(solver, schedule, pred, t, t_next, history, correct)
            for older, newer in zip(steps[::-1], [*history.steps[-2::-1], done] if steps else [], strict=True):
                _put(older, rows, newer)
        for k in range(int(segments.max()), calls):
            denoise_step(k, slice(0, 1))(x[:1], at_time(times[k], x[:1]))
    return x, SolverHistory(noise, steps)


def _no_step(schedule: Schedule, x: Tensor) -> SolverStep:
    """Return a placeholder step at clean data, which no sample uses."""
    t = torch.full((len(x),), schedule.t_clean, dtype=torch.float64, device=x.device)
    return SolverStep(t, *(Split(torch.zeros_like(x), torch.zeros_like(x)) for _ in range(2)))


def _rows(history: SolverHistory, rows: slice) -> SolverHistory:
    """Copy the part of a history that belongs to these rows."""
    steps = [
        SolverStep(s.t[rows].clone(), *(Split(*(p[rows].clone() for p in q)) for q in (s.pred, s.used)))
        for s in history.steps
    ]
    return SolverHistory(history.noise[rows], steps)


def _put(into: SolverStep, rows: slice, done: SolverStep) -> None:
    into.t[rows] = done.t
    for mine, other in ((into.pred, done.pred), (into.used, done.used)):
        mine.x0[rows], mine.eps[rows] = other.x0, other.eps
