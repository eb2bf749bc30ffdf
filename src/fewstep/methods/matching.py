"""Distribution matching along the student's own trajectory. TDM (alg. 1) is its first preset.

One draw gives both updates: roll the student out to a segment, take its step `t_{m+1} -> t_m` with gradient, diffuse the landing
state to a time tau inside the segment, and compare there what the fake score and the guided teacher believe.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones.base import Cond, rows
from ..core import timegrid
from ..core.schedule import Schedule, expand, transition
from ..core.solvers import update_named
from ..core.trajectory import segment_starts
from ..core.weighting import weighting_named
from ..objectives.denoising import denoising, transition_target
from ..objectives.reverse_kl import dmd_normaliser, loss_named
from ..roles.roles import Role, Roles

FAKE_TARGETS = ("clean", "transition")


@dataclass(frozen=True)
class Matching:
    """Settings of the method; the defaults are TDM's. Raises ValueError for settings that cannot be.

    `tau_min` keeps tau away from clean data, as a fraction of the schedule; `warmup` iterations train the fake score alone;
    `share_draw` uses one x_tau for both updates (alg. 1), otherwise each update draws its own.
    """

    steps: int = 4
    guidance: float = 3.5
    loss: str = "huber"
    fake_target: Literal["clean", "transition"] = "clean"
    fake_updates: int = 1
    warmup: int = 100
    share_draw: bool = True
    solver: str = "ddim"
    shift: float = 1.0
    tau_min: float = 0.02
    fake_weight: str = "min-snr"
    snr_clip: float = 5.0
    name: str = "tdm"

    def __post_init__(self) -> None:
        loss_named(self.loss), update_named(self.solver), weighting_named(self.fake_weight)
        if self.steps < 1:
            raise ValueError(f"method.steps: got {self.steps}, allowed are whole numbers from 1; few-step students use 1 to 8")
        if self.fake_target not in FAKE_TARGETS:
            raise ValueError(f"method.fake_target: got {self.fake_target!r}, allowed are {', '.join(FAKE_TARGETS)}")
        if self.fake_updates < 1:
            raise ValueError(f"method.fake_updates: got {self.fake_updates}, allowed are whole numbers from 1")
        if self.warmup < 0:
            raise ValueError(f"method.warmup: got {self.warmup}, allowed are whole numbers from 0 (off)")
        if not 0 <= self.tau_min < 1:
            raise ValueError(f"method.tau_min: got {self.tau_min}, allowed are fractions from 0 up to, not including, 1")
        for option in ("shift", "snr_clip"):
            if not 0 < getattr(self, option) < math.inf:
                raise ValueError(f"method.{option}: got {getattr(self, option)}, allowed are numbers above 0")
        if not math.isfinite(self.guidance):
            raise ValueError(f"method.guidance: got {self.guidance}, allowed are numbers; 1 is without guidance, 3.5 is a good start")

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The student's grid, `[K + 1]`, for its own step count or another."""
        return timegrid.uniform(schedule, steps or self.steps, self.shift)


class Draw(NamedTuple):
    """A landing state with everything that the two updates need. x_m and x0 may carry the student's gradient."""

    cond: Cond
    segment: Tensor  # [B] 0 .. K-1, 0 starts from noise
    t: Tensor  # [B] landing time t_m
    tau: Tensor  # [B] in (t_m, t_{m+1}]
    x_m: Tensor
    x0: Tensor  # the student's clean estimate
    e: Tensor  # transition noise
    x_tau: Tensor


class Loss(NamedTuple):
    """One update to make: whose, by which loss, and what to log."""

    role: Role
    value: Tensor
    metrics: dict[str, Tensor]


def draw(method: Matching, roles: Roles, cond: Cond, batch: int, rng: torch.Generator, with_gradient: bool) -> Draw:
    """Points 1 to 3 of the algorithm. Deterministic in `rng`; independent of any data set."""
    schedule, shape, update = roles.backbone.schedule, roles.backbone.shape, update_named(method.solver)
    times = method.times(schedule).to(rng.device)

    def noise() -> Tensor:
        return torch.randn((batch, *shape), generator=rng, device=rng.device)

    x = noise() * schedule.start_std
    segment = timegrid.draw_segments(batch, method.steps, rng)
    start, before = segment_starts(lambda r: roles.denoise("student", rows(cond, r)), schedule, x, times, segment, update)
    high, t = times[segment], times[segment + 1]
    with torch.set_grad_enabled(with_gradient):
        here = roles.denoise("student", cond)(start, high)
        x_m = update(schedule, here, high, t, before)
    low = torch.maximum(
        t, torch.full_like(t, schedule.t_clean + method.tau_min * (schedule.t_max - schedule.t_clean)).minimum(high - schedule.resolution)
    )
    tau = timegrid.draw_between(schedule, low, high, rng)
    e = noise()
    r, beta = transition(schedule, t, tau)
    x_tau = (expand(r, x) * x_m + expand(beta, x) * e).detach()
    return Draw(cond, segment, t, tau, x_m, here.x0, e, x_tau)


def fake_loss(method: Matching, schedule: Schedule, d: Draw, f_fake: Tensor) -> Tensor:
    """Point 4: denoising regression of the fake score at x_tau (eq. 7), on the clean estimate or the transition noise."""
    weight = weighting_named(method.fake_weight)(schedule, d.tau, method.snr_clip)
    if method.fake_target == "clean":
        return denoising(f_fake, d.x0.detach(), weight)
    goal, precision = transition_target(schedule, d.x_m.detach(), d.e, d.t, d.tau)
    return denoising(f_fake, goal, precision * weight)


def student_loss(method: Matching, d: Draw, f_fake: Tensor, f_teacher: Tensor) -> Tensor:
    """Point 5: reverse KL on the landing state (eq. 6, 11)."""
    delta = (f_fake - f_teacher).detach()
    return loss_named(method.loss)(d.x_m, delta, dmd_normaliser(d.x0.detach(), f_teacher.detach())).mean()


def losses(method: Matching, roles: Roles, cond: Cond, null: Cond, batch: int, rng: torch.Generator, warming_up: bool) -> Iterator[Loss]:
    """The updates of one iteration in order; the caller takes each step before asking for the next.

    With a shared draw the last fake update and the student's update come from one x_tau *and one forward pass* of the fake
    score, taken before its step: network calls per iteration (K+1)/2 + 2 (student) + 2 (guided teacher) + 3 (fake).
    """
    schedule = roles.backbone.schedule
    own_draws = method.fake_updates if warming_up or not method.share_draw else method.fake_updates - 1
    for _ in range(own_draws):
        d = draw(method, roles, cond, batch, rng, with_gradient=False)
        loss = fake_loss(method, schedule, d, roles.denoise("fake", cond)(d.x_tau, d.tau).x0)
        yield Loss("fake", loss, {"fake_loss": loss.detach()})
    if warming_up:
        return
    d = draw(method, roles, cond, batch, rng, with_gradient=True)
    with torch.no_grad():
        f_teacher = roles.teacher(cond, null, method.guidance)(d.x_tau, d.tau).x0
    with torch.set_grad_enabled(method.share_draw):
        f_fake = roles.denoise("fake", cond)(d.x_tau, d.tau).x0
    value = student_loss(method, d, f_fake, f_teacher)
    metrics = {"student_loss": value.detach(), **_gaps(method, d, f_fake, f_teacher)}
    if method.share_draw:
        loss = fake_loss(method, schedule, d, f_fake)
        yield Loss("fake", loss, {"fake_loss": loss.detach()})
    yield Loss("student", value, metrics)


def _gaps(method: Matching, d: Draw, f_fake: Tensor, f_teacher: Tensor) -> dict[str, Tensor]:
    """`rms |f_psi - f_phi|` per segment, the size of the matching gradient before normalisation."""
    gap = (f_fake - f_teacher).detach().square().flatten(1).mean(1)
    return {f"gap_{k}": gap[d.segment == k].mean().sqrt() for k in range(method.steps) if bool((d.segment == k).any())}
