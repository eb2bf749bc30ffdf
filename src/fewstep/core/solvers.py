"""Solvers and sampling.

A solver is one rule: the prediction (x0, eps) used for a step. `x_s = alpha_s x0 + sigma_s eps` with the
network's own prediction is DDIM. Multistep solvers also use past predictions. A head may correct the
direction (`heads`). `sample` applies a solver along a time grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .prediction import Split
from .schedule import Schedule, diffuse, expand

Denoise = Callable[[Tensor, Tensor], Split]  # (x [B, ...], t [B]) -> (x0, eps)
Noise = Callable[[Tensor], Tensor]  # fresh standard noise in the shape, dtype and device of its argument


class SolverStep(NamedTuple):
    """One past step of a trajectory.

    The fields are the time [B], the network's prediction, and the prediction used for the update.
    """

    t: Tensor
    pred: Split
    used: Split


class SolverHistory(NamedTuple):
    """Starting noise and past steps of a trajectory.

    The starting noise [B, ...] has unit variance. The newest step comes first. A past step counts for a
    sample only if the step's time is noisier than the sample's time.
    """

    noise: Tensor
    steps: Sequence[SolverStep] = ()


class State(NamedTuple):
    """One point of a trajectory.

    The fields are the time [B], the state [B, ...], and the clean estimate that led to the state (None at the
    start).
    """

    t: Tensor
    x: Tensor
    x0: Tensor | None


# (schedule, prediction at t, t, next t, past steps, noise) -> the prediction used for the update
Update = Callable[[Schedule, Split, Tensor, Tensor, Sequence[SolverStep], Noise], Split]
Correction = Callable[
    [Split, Tensor, Tensor, SolverHistory], Split
]  # (prediction, t, next t, history) -> corrected prediction


SIGNAL = 2**-12  # alpha of pure noise wherever alpha is a divisor, as in diffusers


@dataclass(frozen=True)
class Solver:
    """A solver's update rule and the solver's properties.

    `stock` is the kind of scheduler in diffusers that takes the same steps; if `stock` is empty, fewstep's
    own scheduler samples students. `clients` holds the sampler's name in other programs; a missing program
    has no such sampler.
    """

    name: str
    update: Update
    order: int = 1
    memory: int = 0  # past steps that the update uses
    stochastic: bool = False
    stock: Literal["dpm-solver++", "lcm", ""] = ""
    clients: Mapping[Literal["comfyui", "a1111"], str] = field(default_factory=dict)
    noise: Noise = torch.randn_like  # noise source of a stochastic solver


def ddim(
    schedule: Schedule,
    pred: Split,
    t: Tensor,
    t_next: Tensor,
    steps: Sequence[SolverStep] = (),
    noise: Noise = torch.randn_like,
) -> Split:
    """Return the network's own prediction, as DDIM does.

    Source: arXiv 2010.02502, eq. 12 with eta = 0.
    """
    return pred


def dpmpp(
    schedule: Schedule,
    pred: Split,
    t: Tensor,
    t_next: Tensor,
    steps: Sequence[SolverStep] = (),
    noise: Noise = torch.randn_like,
) -> Split:
    """Extrapolate x0 in half the log signal-to-noise ratio (DPM-Solver++(2M)).

    Without a past step, and for a step into clean data, the update equals DDIM, as in diffusers. Pure noise
    counts as alpha = `SIGNAL`, so the step after pure noise extrapolates a little.

    Source: arXiv 2211.01095, alg. 2.
    """
    if not steps:
        return pred
    before = steps[0]
    lam = [torch.log(schedule.alpha(s).clamp(min=SIGNAL)) - torch.log(schedule.sigma(s)) for s in (before.t, t, t_next)]
    h_last, h = lam[1] - lam[0], lam[2] - lam[1]
    usable = torch.isfinite(h) & torch.isfinite(h_last) & (before.t > t)
    ratio = torch.where(usable, h / (2 * h_last), torch.zeros_like(h))
    change = expand(ratio, pred.x0) * (pred.x0 - before.pred.x0)
    # Keep the state alpha x0 + sigma eps unchanged.
    return Split(pred.x0 + change, pred.eps - expand(schedule.alpha(t) / schedule.sigma(t), change) * change)


ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(
    schedule: Schedule,
    pred: Split,
    t: Tensor,
    t_next: Tensor,
    steps: Sequence[SolverStep] = (),
    noise: Noise = torch.randn_like,
) -> Split:
    """Combine up to four predictions of eps (iPNDM).

    The current eps and the eps of up to three past steps are combined with Adams-Bashforth coefficients.

    Source: arXiv 2204.13902.
    """
    if not steps:
        return pred
    steps = steps[:3]
    seen = torch.stack([s.t > t for s in steps]).sum(0)
    noises = [pred.eps, *(s.pred.eps for s in steps)]
    change = sum((expand(_adams_bashforth(seen, i), e) * e for i, e in enumerate(noises)), start=-pred.eps)
    ratio = torch.where(seen > 0, schedule.sigma(t) / schedule.alpha(t), 0.0)
    return Split(pred.x0 - expand(ratio, change) * change, pred.eps + change)


def _adams_bashforth(seen: Tensor, i: int) -> Tensor:
    """Return the coefficient of the i-th newest eps for every sample's number of past steps.

    `seen` [B]; returns [B], float64. A table would have to be copied to the device at every step.
    """
    found = torch.full(seen.shape, ADAMS_BASHFORTH[0][i], dtype=torch.float64, device=seen.device)
    for n, row in enumerate(ADAMS_BASHFORTH[1:], 1):
        found = found.masked_fill(seen == n, row[i])
    return found


def renoise(
    schedule: Schedule,
    pred: Split,
    t: Tensor,
    t_next: Tensor,
    steps: Sequence[SolverStep] = (),
    noise: Noise = torch.randn_like,
) -> Split:
    """Replace eps by fresh noise.

    This is stochastic few-step sampling (consistency models; DMD2).
    """
    return Split(pred.x0, noise(pred.x0))


# DDIM takes Euler steps on noise levels.
DDIM = Solver("ddim", ddim, stock="dpm-solver++", clients={"comfyui": "euler", "a1111": "Euler"})
SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        DDIM,
        Solver(
            "dpmpp",
            dpmpp,
            order=2,
            memory=1,
            stock="dpm-solver++",
            clients={"comfyui": "dpmpp_2m", "a1111": "DPM++ 2M"},
        ),
        Solver("ipndm", ipndm, order=4, memory=3),
        Solver(
            "renoise",
            renoise,
            stochastic=True,
            stock="lcm",
            clients={"comfyui": "lcm"},
            # A1111 has no equal sampler: A1111's LCM uses other times.
        ),
    )
}


def solver_named(name: str, noise: Noise = torch.randn_like) -> Solver:
    """Return the solver called `name`.

    `noise` is the noise source of a stochastic solver. Raises ValueError for an unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver: got {name!r}, allowed are {', '.join(SOLVERS)}")
    return replace(SOLVERS[name], noise=noise)


def ddim_step(schedule: Schedule, pred: Split, t_next: Tensor) -> Tensor:
    """Return the state of a DDIM step to t_next.

    `x_s = alpha_s x0 + sigma_s eps`, with s = t_next [B].
    """
    return diffuse(schedule, pred.x0, t_next, pred.eps)


def step(
    solver: Solver,
    schedule: Schedule,
    pred: Split,
    t: Tensor,
    t_next: Tensor,
    history: SolverHistory,
    correct: Correction | None = None,
) -> tuple[Tensor, SolverStep]:
    """Take one solver step from t to t_next.

    t, t_next [B]. Returns the next state and the `SolverStep` for the history.
    """
    used = solver.update(schedule, pred, t, t_next, history.steps, solver.noise)
    if correct is not None:
        used = correct(used, t, t_next, history)
    return ddim_step(schedule, used, t_next), SolverStep(t, pred, used)


def at_time(t: Tensor, x: Tensor) -> Tensor:
    """Return one time of the host for every sample of x.

    `[] -> [B]`, on the device of x. The device is told the number: it neither waits for a copy nor is waited for.
    """
    return torch.full((len(x),), float(t), dtype=t.dtype, device=x.device)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    solver: Solver = DDIM,
    correct: Correction | None = None,
) -> Iterator[State]:
    """Yield the K + 1 states of a trajectory.

    The solver integrates down `times [K + 1]`, on the CPU, from `x [B, ...]`, with one network call per step.
    """
    t = at_time(times[0], x)
    history = SolverHistory(x / schedule.start_std)
    keep = solver.memory if correct is None else len(times)
    yield State(t, x, None)
    for end in times[1:]:
        t_next = at_time(end, x)
        x, done = step(solver, schedule, denoise(x, t), t, t_next, history, correct)
        history, t = SolverHistory(history.noise, (done, *history.steps)[:keep]), t_next
        yield State(t, x, done.pred.x0 if correct is None else done.used.x0)


def analytic_direction(schedule: Schedule, x: Tensor, t: Tensor) -> Split:
    """Return the analytic direction at pure noise.

    Returns `eps = x / sqrt(alpha^2 + sigma^2)`, the part of x that remains at pure noise, and the x0 that
    belongs to this eps.

    Source: AFS, Dockhorn et al., arXiv 2210.05475.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    norm = (alpha**2 + sigma**2).sqrt()
    return Split(expand(alpha / (norm * (norm + sigma)), x) * x, x / expand(norm, x))


def total_nfe(steps: int, per_step: int = 1, analytic: bool = False) -> int:
    """Return the network evaluations (NFE) of one sample.

    An `analytic` first step costs no evaluation.
    """
    return per_step * (steps - analytic)


def with_analytic_first_step(
    denoise: Denoise, schedule: Schedule, always: bool = False, noisy: Tensor | None = None
) -> Denoise:
    """Return `denoise` with an analytic first step.

    At pure noise the `analytic_direction` replaces the network's prediction, and the network is not called.
    If only part of the batch is at t_max, the network is called for the whole batch, and the prediction is
    used for the other samples. `always` forces the call, which sharded networks need.

    `noisy` says on the CPU which samples are at t_max, for a caller who knows: a device need not be asked.
    """

    def first(x: Tensor, t: Tensor) -> Split:
        free = t >= schedule.t_max
        known = free if noisy is None else noisy
        if not bool(known.any()):
            return denoise(x, t)
        own = analytic_direction(schedule, x, t)
        if bool(known.all()) and not always:
            return own
        return Split(*(torch.where(expand(free, x) > 0, a, b) for a, b in zip(own, denoise(x, t), strict=True)))

    return first


def heun(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor) -> Iterator[State]:
    """Yield the states of Heun's method, which has second order.

    The coordinates are `x/alpha, sigma/alpha` (EDM, alg. 1). A step costs two network calls; the last step,
    into clean data, costs one. The step from noise without signal, where these coordinates do not exist, also
    costs one: that step follows the prediction at the noisy end, which does not lower the order.
    """
    t = at_time(times[0], x)
    yield State(t, x, None)
    for start, end in pairwise(times):
        halved = float(schedule.alpha(start[None])) > SIGNAL and bool(end > times[-1])
        t_next = at_time(end, x)
        pred = denoise(x, t)
        x_next = ddim_step(schedule, pred, t_next)
        x0 = pred.x0
        if halved:
            pred_next = denoise(x_next, t_next)
            # In these coordinates d = eps: the trapezoidal rule averages the eps at both ends of the step.
            alpha, alpha_next = expand(schedule.alpha(t), x), expand(schedule.alpha(t_next), x)
            size = expand(schedule.sigma(t_next) / schedule.alpha(t_next) - schedule.sigma(t) / schedule.alpha(t), x)
            x_next = alpha_next * (x / alpha + size * (pred.eps + pred_next.eps) / 2)
            x0 = pred_next.x0
        x, t = x_next, t_next
        yield State(t, x, x0)
