"""Samplers. A first-order or multistep method is one update rule; `sample` walks any of them down a grid of times."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .prediction import Split
from .schedule import Schedule, expand

Denoise = Callable[[Tensor, Tensor], Split]  # (x [B, ...], t [B]) -> (x0, eps)
Noise = Callable[[Tensor], Tensor]  # fresh standard noise in the shape, dtype and device of its argument


class Estimate(NamedTuple):
    """What a solver remembers of a visited state: its time [B] and the clean estimate made there [B, ...]."""

    t: Tensor
    x0: Tensor


class State(NamedTuple):
    """One point of a trajectory: time [B], state [B, ...], and the clean estimate that led to it (None at the start)."""

    t: Tensor
    x: Tensor
    x0: Tensor | None


# (schedule, split at t, t, next t, previous estimate) -> next state
Update = Callable[[Schedule, Split, Tensor, Tensor, Estimate | None], Tensor]


def ddim(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, before: Estimate | None = None) -> Tensor:
    """`x_s = alpha_s x0_hat + sigma_s eps_hat` (arXiv 2010.02502, eq. 12 with eta = 0)."""
    return expand(schedule.alpha(t_next), here.x0) * here.x0 + expand(schedule.sigma(t_next), here.x0) * here.eps


def dpmpp(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, before: Estimate | None = None) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, alg. 2): DDIM with x0 extrapolated in half the log signal-to-noise ratio.

    Without a previous estimate (or one of the same time) and into clean data it is DDIM, as in diffusers. Pure noise counts as
    alpha = 2^-12, as in diffusers, so that the step after it extrapolates a little.
    """
    if before is None:
        return ddim(schedule, here, t, t_next)
    lam = [torch.log(schedule.alpha(s).clamp(min=2**-12)) - torch.log(schedule.sigma(s)) for s in (before.t, t, t_next)]
    h_last, h = lam[1] - lam[0], lam[2] - lam[1]
    usable = torch.isfinite(h) & torch.isfinite(h_last) & (h_last != 0)
    ratio = torch.where(usable, h / (2 * h_last), torch.zeros_like(h))
    x0 = here.x0 + expand(ratio, here.x0) * (here.x0 - before.x0)
    # (alpha_s - sigma_s/sigma_t alpha_t) x0 + sigma_s/sigma_t x_t, with x_t = alpha_t here.x0 + sigma_t here.eps
    alpha, sigma, alpha_t, sigma_t = (
        expand(f, x0) for f in (schedule.alpha(t_next), schedule.sigma(t_next), schedule.alpha(t), schedule.sigma(t))
    )
    return alpha * x0 + sigma * (here.eps + alpha_t / sigma_t * (here.x0 - x0))


def sample(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, update: Update = ddim) -> Iterator[State]:
    """Walk `update` down `times [K + 1]` from `x [B, ...]` at times[0]; yields K + 1 states, one network call a step."""
    t = times[0].to(x.device).expand(len(x))
    before: Estimate | None = None
    yield State(t, x, None)
    for t_next in times[1:]:
        t_next = t_next.to(x.device).expand(len(x))
        here = denoise(x, t)
        x = update(schedule, here, t, t_next, before)
        before, t = Estimate(t, here.x0), t_next
        yield State(t, x, here.x0)


def heun(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor) -> Iterator[State]:
    """Second order in the coordinates `x/alpha, sigma/alpha` (EDM, alg. 1); two network calls a step, one into clean data.

    Needs alpha > 0 at times[0]; with zero terminal SNR start from the next time or use `sample`.
    """
    t = times[0].to(x.device).expand(len(x))
    yield State(t, x, None)
    for last, t_next in ((i == len(times) - 2, b) for i, (_, b) in enumerate(pairwise(times))):
        t_next = t_next.to(x.device).expand(len(x))
        here = denoise(x, t)
        x_next = ddim(schedule, here, t, t_next)
        x0 = here.x0
        if not last:
            there = denoise(x_next, t_next)
            # d = eps in these coordinates: the trapezoidal rule averages the two noises along the same step.
            alpha, alpha_next = expand(schedule.alpha(t), x), expand(schedule.alpha(t_next), x)
            step = expand(schedule.sigma(t_next) / schedule.alpha(t_next) - schedule.sigma(t) / schedule.alpha(t), x)
            x_next = alpha_next * (x / alpha + step * (here.eps + there.eps) / 2)
            x0 = there.x0
        x, t = x_next, t_next
        yield State(t, x, x0)


def renoising(noise: Noise) -> Update:
    """`x_s = alpha_s x0_hat + sigma_s e` with fresh noise e: stochastic few-step sampling (consistency models; DMD2)."""

    def renoise(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, before: Estimate | None = None) -> Tensor:
        return ddim(schedule, Split(here.x0, noise(here.x0)), t, t_next)

    return renoise


UPDATES: dict[str, Update] = {"ddim": ddim, "dpmpp": dpmpp}
STOCHASTIC: dict[str, Callable[[Noise], Update]] = {"renoise": renoising}


def update_named(name: str, noise: Noise = torch.randn_like) -> Update:
    """The update rule called `name`; `noise` is what a stochastic one draws. Raises ValueError listing the known ones."""
    if name in STOCHASTIC:
        return STOCHASTIC[name](noise)
    if name not in UPDATES:
        raise ValueError(f"solver: got {name!r}, allowed are {', '.join([*UPDATES, *STOCHASTIC])}")
    return UPDATES[name]
