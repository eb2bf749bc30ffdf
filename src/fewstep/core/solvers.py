"""Samplers. Each deterministic or stochastic solver is one rule: the split of the state that its step is taken along.

`x_s = alpha_s x0 + sigma_s eps` with the network's own split is DDIM; multistep solvers put in a split that takes earlier ones
into account, a head may correct it (`trajp`), and `sample` walks any of them down a grid of times.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .prediction import Split
from .schedule import Schedule, diffuse, expand

Denoise = Callable[[Tensor, Tensor], Split]  # (x [B, ...], t [B]) -> (x0, eps)
Noise = Callable[[Tensor], Tensor]  # fresh standard noise in the shape, dtype and device of its argument


class Visit(NamedTuple):
    """A state that was left: its time [B], what the network said there, and the split along which the step was taken."""

    t: Tensor
    here: Split
    way: Split


class Past(NamedTuple):
    """Where a trajectory comes from: its starting noise [B, ...] of unit variance, and the states it left, the newest first.

    A visit whose time is not noisier than a sample's own is none of that sample's.
    """

    noise: Tensor
    visits: Sequence[Visit] = ()


class State(NamedTuple):
    """One point of a trajectory: time [B], state [B, ...], and the clean estimate that led to it (None at the start)."""

    t: Tensor
    x: Tensor
    x0: Tensor | None


Rule = Callable[[Schedule, Split, Tensor, Tensor, Sequence[Visit]], Split]  # (schedule, split at t, t, next t, visits) -> way
Correct = Callable[[Split, Tensor, Tensor, Past], Split]  # (way, t, next t, past) -> way


SIGNAL = 2**-12  # alpha of pure noise where it is divided by, as in diffusers


class Solver(NamedTuple):
    """A rule, and how many visits it looks back at."""

    rule: Rule
    memory: int = 0


def along(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, visits: Sequence[Visit] = ()) -> Split:
    """The network's own split: DDIM (arXiv 2010.02502, eq. 12 with eta = 0)."""
    return here


def dpmpp(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, visits: Sequence[Visit] = ()) -> Split:
    """DPM-Solver++(2M) (arXiv 2211.01095, alg. 2): x0 extrapolated in half the log signal-to-noise ratio.

    Without an earlier visit and into clean data it is DDIM, as in diffusers. Pure noise counts as alpha = `SIGNAL`,
    so that the step after it extrapolates a little.
    """
    if not visits:
        return here
    before = visits[0]
    lam = [torch.log(schedule.alpha(s).clamp(min=SIGNAL)) - torch.log(schedule.sigma(s)) for s in (before.t, t, t_next)]
    h_last, h = lam[1] - lam[0], lam[2] - lam[1]
    usable = torch.isfinite(h) & torch.isfinite(h_last) & (before.t > t)
    ratio = torch.where(usable, h / (2 * h_last), torch.zeros_like(h))
    step = expand(ratio, here.x0) * (here.x0 - before.here.x0)
    # The state stays what it is: alpha x0 + sigma eps.
    return Split(here.x0 + step, here.eps - expand(schedule.alpha(t) / schedule.sigma(t), step) * step)


ADAMS_BASHFORTH = ((1.0, 0.0, 0.0, 0.0), (3 / 2, -1 / 2, 0.0, 0.0), (23 / 12, -16 / 12, 5 / 12, 0.0), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, visits: Sequence[Visit] = ()) -> Split:
    """iPNDM (arXiv 2204.13902): the noises of up to three earlier visits, combined by Adams and Bashforth's coefficients."""
    if not visits:
        return here
    visits = visits[:3]
    seen = torch.stack([v.t > t for v in visits]).sum(0)
    table = torch.tensor(ADAMS_BASHFORTH, dtype=torch.float64, device=t.device)[seen]
    noises = [here.eps, *(v.here.eps for v in visits)]
    change = sum((expand(table[:, i], e) * e for i, e in enumerate(noises)), start=-here.eps)
    ratio = torch.where(seen > 0, schedule.sigma(t) / schedule.alpha(t), torch.zeros_like(table[:, 0]))
    return Split(here.x0 - expand(ratio, change) * change, here.eps + change)


def renoising(noise: Noise) -> Rule:
    """`x_s = alpha_s x0_hat + sigma_s e` with fresh noise e: stochastic few-step sampling (consistency models; DMD2)."""

    def renoise(schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, visits: Sequence[Visit] = ()) -> Split:
        return Split(here.x0, noise(here.x0))

    return renoise


SOLVERS: dict[str, Solver] = {"ddim": Solver(along), "dpmpp": Solver(dpmpp, 1), "ipndm": Solver(ipndm, 3)}
STOCHASTIC: dict[str, Callable[[Noise], Rule]] = {"renoise": renoising}
DDIM = SOLVERS["ddim"]


def solver_named(name: str, noise: Noise = torch.randn_like) -> Solver:
    """The solver called `name`; `noise` is what a stochastic one draws. Raises ValueError listing the known ones."""
    if name in STOCHASTIC:
        return Solver(STOCHASTIC[name](noise))
    if name not in SOLVERS:
        raise ValueError(f"solver: got {name!r}, allowed are {', '.join([*SOLVERS, *STOCHASTIC])}")
    return SOLVERS[name]


def land(schedule: Schedule, way: Split, t_next: Tensor) -> Tensor:
    """`x_s = alpha_s x0 + sigma_s eps`: where a step along this split arrives. t_next [B]."""
    return diffuse(schedule, way.x0, t_next, way.eps)


def step(
    solver: Solver, schedule: Schedule, here: Split, t: Tensor, t_next: Tensor, past: Past, correct: Correct | None = None
) -> tuple[Tensor, Visit]:
    """One step from t to t_next [B]: the state it lands on, and the visit that it leaves behind."""
    way = solver.rule(schedule, here, t, t_next, past.visits)
    if correct is not None:
        way = correct(way, t, t_next, past)
    return land(schedule, way, t_next), Visit(t, here, way)


def sample(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, solver: Solver = DDIM, correct: Correct | None = None
) -> Iterator[State]:
    """Walk `solver` down `times [K + 1]` from `x [B, ...]` at times[0]; yields K + 1 states, one network call a step."""
    t = times[0].to(x.device).expand(len(x))
    past = Past(x / schedule.start_std)
    keep = solver.memory if correct is None else len(times)
    yield State(t, x, None)
    for t_next in times[1:]:
        t_next = t_next.to(x.device).expand(len(x))
        x, visit = step(solver, schedule, denoise(x, t), t, t_next, past, correct)
        past, t = Past(past.noise, (visit, *past.visits)[:keep]), t_next
        yield State(t, x, visit.here.x0 if correct is None else visit.way.x0)


def free_direction(schedule: Schedule, x: Tensor, t: Tensor) -> Split:
    """`eps = x / sqrt(alpha^2 + sigma^2)`, which is what is left of x at pure noise (AFS, Dockhorn et al., arXiv 2210.05475)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    norm = (alpha**2 + sigma**2).sqrt()
    return Split(expand(alpha / (norm * (norm + sigma)), x) * x, x / expand(norm, x))


def evaluations(steps: int, calls: int = 1, free: bool = False) -> int:
    """Network evaluations of one sample in so many of `sample`'s steps: `calls` each, none in a first step that is `free` (see `free_first`)."""
    return calls * (steps - free)


def free_first(denoise: Denoise, schedule: Schedule, always: bool = False) -> Denoise:
    """`denoise` that gives the `free_direction` at pure noise without asking the network.

    A batch that is only in part at pure noise asks it all the same and takes its word for the rest; with `always` so does every batch.
    """

    def first(x: Tensor, t: Tensor) -> Split:
        free = t >= schedule.t_max
        if not bool(free.any()):
            return denoise(x, t)
        own = free_direction(schedule, x, t)
        if bool(free.all()) and not always:
            return own
        return Split(*(torch.where(expand(free, x) > 0, a, b) for a, b in zip(own, denoise(x, t), strict=True)))

    return first


def heun(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor) -> Iterator[State]:
    """Second order in the coordinates `x/alpha, sigma/alpha` (EDM, alg. 1); two network calls a step, one into clean data.

    And one from noise without signal, where these coordinates are none: that step goes along its own beginning, which costs no order.
    """
    t = times[0].to(x.device).expand(len(x))
    yield State(t, x, None)
    for start, end in pairwise(times):
        halved = float(schedule.alpha(start[None])) > SIGNAL and bool(end > times[-1])
        t_next = end.to(x.device).expand(len(x))
        here = denoise(x, t)
        x_next = land(schedule, here, t_next)
        x0 = here.x0
        if halved:
            there = denoise(x_next, t_next)
            # d = eps in these coordinates: the trapezoidal rule averages the two noises along the same step.
            alpha, alpha_next = expand(schedule.alpha(t), x), expand(schedule.alpha(t_next), x)
            step = expand(schedule.sigma(t_next) / schedule.alpha(t_next) - schedule.sigma(t) / schedule.alpha(t), x)
            x_next = alpha_next * (x / alpha + step * (here.eps + there.eps) / 2)
            x0 = there.x0
        x, t = x_next, t_next
        yield State(t, x, x0)
