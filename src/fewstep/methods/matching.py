"""Distribution matching along the student's own trajectory: TDM (alg. 1), its variants and its rivals as settings of one method.

Where on the path (the noisy landing state or the clean estimate, diffused over its segment or over all times) x which divergence
x how many steps. One draw gives both updates: roll the student out to a segment, take its step `t_{m+1} -> t_m` with gradient,
diffuse the matched state to a time tau, and compare there what the fake score and the guided teacher believe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones.base import Cond, rows
from ..core import timegrid
from ..core.prediction import Row
from ..core.schedule import Schedule, diffuse, expand, transition
from ..core.solvers import solver_named, step
from ..core.trajectory import segment_starts
from ..core.weighting import weighting_named
from ..objectives.adversarial import game_named, gradient_penalty
from ..objectives.denoising import denoising, transition_target
from ..objectives.fisher import fisher
from ..objectives.regression import metric_named
from ..objectives.reverse_kl import dmd_normaliser, loss_named
from ..roles.roles import Roles
from ..words import speaks_python
from .method import Loss, Needs, Real, Turn, Walk, draw_count, student_of
from .paths import fold
from .settings import (
    MOST_UPDATES,
    require_choice,
    require_counts,
    require_finite,
    require_free_first,
    require_guidance,
    require_name,
    require_positive,
    require_weight,
    require_whole,
)

CHOICES = {
    "divergence": ("reverse-kl", "fisher"),
    "match": ("landing", "clean"),
    "tau": ("segment", "above", "whole"),
    "fake_draw": ("landing", "clean"),
    "fake_target": ("clean", "transition"),
    "head": ("keep", "fold", "none"),
}


@speaks_python("method")
@dataclass(frozen=True)
class Matching:
    """Settings of the method; the defaults are TDM's. Raises ValueError for settings that cannot be.

    `steps`: one count, or several of which every iteration draws one (TDM-unify, eq. 8; named twice, twice as often), the first being the default when sampling;
    `condition` tells student and fake score which. `guidance` is the teacher's; a `guidance_tilt` b makes it `guidance (1 + b (2u - 1))` at the fraction
    u of the path, so that it is (1 + b) times as strong at pure noise, where it composes, and (1 - b) times at clean data, where it hurts; `guidance_parallel` is the share of it along the clean estimate that stays (`backbones.base.projected`). `match`: the noisy state that a step lands on, or the clean estimate that it
    makes. `tau`: inside the step's own segment (eq. 5), from there up to pure noise, or over all times; `tau_min` and `tau_max`
    keep it away from the ends, as fractions of the schedule. `fake_draw`: what x_tau is diffused from for the fake score's update
    (`landing` is eq. 7's importance draw).
    `fake_weight` is a weighting of `core.weighting`: `own` weighs its errors as those of what the network predicts, clipped at `snr_clip`. `share_draw` uses one x_tau for both updates (alg. 1), otherwise each update draws its
    own. `warmup` iterations train the fake score alone. `fisher_correction` is c of `objectives.fisher`. `gan` is the weight of the adversarial
    term (eq. 16), 0 for none: it needs real data. The matching losses take in all of a sample's elements, this is a mean over tokens, so that 5 beside `huber` is a fifth of its gradient and 0.05 is
    nothing (500 beside `l2`: half; measured on the bundled teacher). `gan_r1` is that of its gradient penalty. `anchor` is the weight of
    a regression (DMD, arXiv 2311.18828, eq. 9; here on every landing state): students then start from the noise of the teacher's trajectories, and where they land is pulled to where these pass. `head`: one that came with the student
    it starts from stays and is trained on (`keep`), goes into the student's weights during the warm-up (`fold`), or is left out (`none`). `free_first` takes the first direction without the network, as in `PathImitation`.
    """

    steps: int | tuple[int, ...] = 4
    condition: bool = True
    guidance: float = 3.5
    guidance_tilt: float = 0.0
    guidance_parallel: float = 1.0
    divergence: Literal["reverse-kl", "fisher"] = "reverse-kl"
    loss: str = "huber"
    fisher_correction: float = 0.5
    gan: float = 0.0
    gan_loss: str = "hinge"
    gan_r1: float = 0.0
    anchor: float = 0.0
    match: Literal["landing", "clean"] = "landing"
    tau: Literal["segment", "above", "whole"] = "segment"
    tau_min: float = 0.02
    tau_max: float = 1.0
    fake_draw: Literal["landing", "clean"] = "landing"
    fake_target: Literal["clean", "transition"] = "clean"
    fake_updates: int = 1
    fake_weight: str = "own"
    snr_clip: float = 5.0
    warmup: int = 100
    share_draw: bool = True
    solver: str = "ddim"
    shift: float = 1.0
    head: Literal["keep", "fold", "none"] = "keep"
    free_first: bool = False
    name: str = "tdm"

    def __post_init__(self) -> None:
        loss_named(self.loss), solver_named(self.solver), weighting_named(self.fake_weight), game_named(self.gan_loss)
        require_counts(self.steps)
        for option, allowed in CHOICES.items():
            require_choice(self, option, allowed)
        require_whole(self, "fake_updates", most=MOST_UPDATES)
        require_whole(self, "warmup", least=0)
        if not 0 <= self.tau_min < 1:
            raise ValueError(f"method.tau_min: got {self.tau_min}, allowed are fractions from 0 up to, not including, 1")
        if not self.tau_min < self.tau_max <= 1:
            raise ValueError(f"method.tau_max: got {self.tau_max}, allowed are fractions above method.tau_min ({self.tau_min}) up to 1")
        if self.tau == "whole" and self.match != "clean":
            raise ValueError("method.tau: got whole, which needs method.match=clean: a noisy state is diffused to noisier times only")
        require_positive(self, "shift", "snr_clip")
        require_finite(self, "fisher_correction")
        require_weight(self, "gan", "gan_r1", "anchor")
        if self.anchor and self.gan:
            raise ValueError(
                f"method.anchor: got {self.anchor} beside method.gan={self.gan}; a recipe has data for one of them, set the other to 0"
            )
        if self.anchor and self.solver == "renoise":
            raise ValueError(
                "method.anchor: got a weight with method.solver=renoise, whose states are at random; set it to 0, or the solver to ddim"
            )
        if self.head == "fold" and not self.warmup:
            raise ValueError(
                "method.head: got fold with method.warmup=0, and the warm-up is when it is folded; set method.warmup above 0, e.g. 100"
            )
        if self.head == "fold" and self.solver == "renoise":
            raise ValueError(
                "method.head: got fold with method.solver=renoise, whose states are at random; set it to none, or the solver to ddim"
            )
        require_guidance(self)
        require_free_first(self)
        if self.name == "tdm":  # the default: settings that are another's have its name
            object.__setattr__(self, "name", self._own_name())
        require_name(self)
        if not -1 <= self.guidance_tilt <= 1:
            raise ValueError(
                f"method.guidance_tilt: got {self.guidance_tilt}, allowed are numbers from -1 to 1; 0 is the same guidance everywhere"
            )

    def _own_name(self) -> str:
        fisher, clean = self.divergence == "fisher", self.match == "clean" and self.tau == "whole"
        if clean:
            one = not fisher and self.counts == (1,) and self.fake_updates == 1 and self.solver != "renoise"
            return "sid" if fisher else "diff-instruct" if one else "dmd2" if self.solver == "renoise" and not self.share_draw else "tdm"
        if self.match != "landing":
            return "tdm"
        return "tdm-fisher" if fisher else "tdm-unify" if len(self.counts) > 1 else "tdm"

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student serves, the default first."""
        return require_counts(self.steps)

    @property
    def tells(self) -> Literal["steps", "guidance"]:
        return "steps"

    @property
    def conditioned(self) -> tuple[int, ...]:
        """The step counts that student and fake score are told apart; empty for one count alone or without the condition."""
        return self.counts if self.condition and len(self.counts) > 1 else ()

    @property
    def needs(self) -> Needs:
        """A fake score; for the adversarial term a discriminator and real pictures, for the regression the teacher's trajectories."""
        return Needs(fake=True, adversary=self.gan > 0, pictures=self.gan > 0, paths=self.anchor > 0)

    def times(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The student's grid, `[K + 1]`, for its default step count or another."""
        return timegrid.uniform(schedule, steps or self.counts[0], self.shift)

    def losses(self, roles: Roles, turn: Turn) -> Iterator[Loss]:
        """The updates of one iteration in order."""
        warming_up = turn.iteration < self.warmup
        yield from losses(self, roles, turn.cond, turn.null, turn.batch, turn.rng, warming_up, turn.pictures, turn.steps, turn.walk)
        if warming_up and roles.folding is not None:
            yield from fold(self, roles, turn)


class Draw(NamedTuple):
    """A matched state with everything that the two updates need. landed, x_m, x0 and x_tau may carry the student's gradient."""

    cond: Cond
    steps: int  # K of this iteration
    segment: Tensor  # [B] 0 .. K-1, 0 starts from noise
    t: Tensor  # [B] time of x_m: the landing time, or that of clean data
    tau: Tensor  # [B]
    landed: Tensor  # where the step ends
    x_m: Tensor  # what is matched
    x0: Tensor  # the student's clean estimate
    e: Tensor  # transition noise
    x_tau: Tensor


def draw(
    method: Matching,
    roles: Roles,
    cond: Cond,
    batch: int,
    rng: torch.Generator,
    with_gradient: bool,
    steps: int | None = None,
    begin: Tensor | None = None,
) -> Draw:
    """Points 1 to 3 of the algorithm. Deterministic in `rng`; independent of any data set, but where the states to `begin` at are given."""
    schedule, shape = roles.backbone.schedule, roles.backbone.shape
    steps = steps or draw_count(method.steps, rng)
    times = method.times(schedule, steps).to(rng.device)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, device=rng.device)

    solver = solver_named(method.solver, noise)
    x = noise(torch.empty((batch, *shape))) * schedule.start_std if begin is None else begin
    idle = int(method.free_first and roles.head is None)  # a free first step has nothing of its own to train
    segment = idle + timegrid.draw_segments(batch, steps - idle, rng)
    student = partial(student_of, method, roles, steps=steps)
    calls = steps - 1 if roles.sharded else 0  # as many as any process may need
    start, past = segment_starts(lambda r: student(rows(cond, r)), schedule, x, times, segment, solver, roles.head, calls)
    high, landing = times[segment], times[segment + 1]
    with torch.set_grad_enabled(with_gradient):
        landed, visit = step(solver, schedule, student(cond, always=roles.sharded)(start, high), high, landing, past, roles.head)
        clean, x0 = method.match == "clean", visit.here.x0 if roles.head is None else visit.way.x0
        x_m = x0 if clean else landed
    tau = _draw_tau(method, schedule, landing, high, rng)
    t = torch.full_like(landing, schedule.t_clean) if clean else landing
    e = noise(x)
    r, beta = transition(schedule, t, tau)
    with torch.set_grad_enabled(with_gradient):
        x_tau = expand(r, x) * x_m + expand(beta, x) * e
    return Draw(cond, steps, segment, t, tau, landed, x_m, x0, e, x_tau)


def _draw_tau(method: Matching, schedule: Schedule, landing: Tensor, high: Tensor, rng: torch.Generator) -> Tensor:
    """tau `[B]` in (low, high]: the landing time or `tau_min`, whichever is noisier, and the segment's start or `tau_max`."""
    low = torch.full_like(landing, schedule.t_clean) if method.tau == "whole" else landing
    top = high if method.tau == "segment" else torch.full_like(high, schedule.t_max)
    least, most = (timegrid.time_at(schedule, torch.full_like(high, u)) for u in (method.tau_min, method.tau_max))
    top = torch.where(most > low, top.minimum(most), top)
    least = least.minimum(top - schedule.resolution)
    return timegrid.draw_between(schedule, torch.maximum(low, least), top, rng)


def guidance_at(method: Matching, schedule: Schedule, tau: Tensor) -> float | Tensor:
    """The teacher's guidance scale at tau `[B]`; one number where it is the same everywhere."""
    if not method.guidance_tilt:
        return method.guidance
    return method.guidance * (1 + method.guidance_tilt * (2 * schedule.fraction(tau) - 1))


def fake_loss(method: Matching, schedule: Schedule, row: Row, d: Draw, f_fake: Tensor) -> Tensor:
    """Point 4: denoising regression of the fake score at x_tau (eq. 7), on the clean estimate or the transition noise."""
    weight = weighting_named(method.fake_weight)(schedule, row, d.tau, method.snr_clip)
    if method.fake_target == "clean" or method.fake_draw == "clean":
        return denoising(f_fake, d.x0, weight).mean()
    goal, precision = transition_target(schedule, d.x_m.detach(), d.e, d.t, d.tau)
    return denoising(f_fake, goal, precision * weight).mean()


def student_loss(method: Matching, d: Draw, f_fake: Tensor, f_teacher: Tensor) -> Tensor:
    """Point 5 with reverse KL: on the matched state (eq. 6, 11)."""
    delta = (f_fake - f_teacher).detach()
    return loss_named(method.loss)(d.x_m, delta, dmd_normaliser(d.x0.detach(), f_teacher.detach())).mean()


def fisher_loss(method: Matching, schedule: Schedule, d: Draw, f_fake: Tensor, f_teacher: Tensor) -> Tensor:
    """Point 5 with Fisher divergence (tab. 8): both estimates carry the gradient of the x_tau they were made at."""
    f_cond, weight = transition_target(schedule, d.x_m, d.e, d.t, d.tau)
    value = fisher(f_teacher, f_fake, f_cond, dmd_normaliser(d.x0.detach(), f_teacher.detach()), method.fisher_correction)
    return (weight.to(value) * value).mean()


def discriminator_loss(method: Matching, roles: Roles, d: Draw, real: Real) -> Tensor:
    """Real data diffused to the same tau against the student's x_tau, on the teacher's features of both (eq. 16)."""
    assert roles.discriminator is not None
    judge, game = roles.discriminator, game_named(method.gan_loss)
    with torch.no_grad():
        theirs = judge.tokens(diffuse(roles.backbone.schedule, real.x0, d.tau, d.e), d.tau, real.cond)
        ours = judge.tokens(d.x_tau, d.tau, d.cond)
    theirs = [f.requires_grad_(method.gan_r1 > 0) for f in theirs]
    logits = judge.logits(theirs, d.tau, d.steps)
    value = game.real(logits) + game.fake(judge.logits(ours, d.tau, d.steps))
    if method.gan_r1:
        value = value + method.gan_r1 * gradient_penalty(list(torch.autograd.grad(logits.mean(1).sum(), theirs, create_graph=True)))
    return value.mean()


def adversarial_loss(method: Matching, roles: Roles, d: Draw) -> Tensor:
    """The student's side of the game; its gradient goes through the teacher's features into x_tau."""
    assert roles.discriminator is not None
    judge = roles.discriminator
    return game_named(method.gan_loss).student(judge.logits(judge.tokens(d.x_tau, d.tau, d.cond), d.tau, d.steps)).mean()


def losses(
    method: Matching,
    roles: Roles,
    cond: Cond,
    null: Cond,
    batch: int,
    rng: torch.Generator,
    warming_up: bool,
    real: Real | None = None,
    steps: int | None = None,
    walk: Walk | None = None,
) -> Iterator[Loss]:
    """The updates of one iteration in order; the caller takes each step before asking for the next, or both where they go together.

    With a shared draw the last fake update and the student's reverse-KL update come from one x_tau *and one forward pass* of the
    fake score, taken before its step: network calls per iteration (K+1)/2 + 2 (student) + 2 (guided teacher) + 3 (fake). The
    Fisher divergence needs the fake score's gradient in x_tau, so it shares x_tau alone and costs 3 + 2 x 2 calls more.
    """
    schedule, row = roles.backbone.schedule, roles.backbone.row
    cond, begin = (cond, None) if walk is None else (walk.cond, walk.states[:, 0])
    steps = steps or draw_count(method.steps, rng)
    drawn = partial(draw, method, roles, cond, batch, rng, steps=steps, begin=begin)
    fake = roles.denoise("fake", cond, steps)

    def update_fake(d: Draw) -> Loss:
        x_tau = diffuse(schedule, d.x0, d.tau, d.e) if method.fake_draw == "clean" else d.x_tau
        loss = fake_loss(method, schedule, row, d, fake(x_tau.detach(), d.tau).x0)
        return Loss("fake", loss, {"fake_loss": loss.detach()})

    for _ in range(method.fake_updates if warming_up or not method.share_draw else method.fake_updates - 1):
        yield update_fake(drawn(with_gradient=False))
    if warming_up:
        return
    d = drawn(with_gradient=True)
    teacher = roles.teacher(cond, null, guidance_at(method, schedule, d.tau), method.guidance_parallel)
    one_pass = method.share_draw and method.divergence == "reverse-kl" and method.fake_draw == "landing"
    if method.share_draw and not one_pass:
        yield update_fake(d)
    if method.divergence == "fisher":
        f_teacher, f_fake = teacher(d.x_tau, d.tau).x0, fake(d.x_tau, d.tau).x0
        value = fisher_loss(method, schedule, d, f_fake, f_teacher)
    else:
        with torch.no_grad():
            f_teacher = teacher(d.x_tau, d.tau).x0
        with torch.set_grad_enabled(one_pass):
            f_fake = fake(d.x_tau.detach(), d.tau).x0
        value = student_loss(method, d, f_fake, f_teacher)
    metrics = {"student_loss": value.detach(), **_gaps(method, d, f_fake, f_teacher)}
    if one_pass:
        loss = fake_loss(method, schedule, row, d, f_fake)
        yield Loss("fake", loss, {"fake_loss": loss.detach()}, together=not method.gan)
    if method.gan:
        assert real is not None
        judged = discriminator_loss(method, roles, d, real)
        yield Loss("discriminator", judged, {"discriminator_loss": judged.detach()})
        adversarial = adversarial_loss(method, roles, d)
        value, metrics = value + method.gan * adversarial, metrics | {"gan_loss": adversarial.detach()}
    if walk is not None:
        anchor = anchor_loss(method, schedule, d, walk)
        value, metrics = value + method.anchor * anchor, metrics | {"anchor_loss": anchor.detach()}
    yield Loss("student", value, metrics)


def anchor_loss(method: Matching, schedule: Schedule, d: Draw, walk: Walk) -> Tensor:
    """`mean |x - x_teacher|` where the student's steps land, against the teacher's trajectories from the same noise."""
    passed = (walk.times.to(d.t)[None] - method.times(schedule, d.steps).to(d.t)[d.segment + 1, None]).abs().argmin(1)
    return metric_named("l1")(d.landed, walk.states[torch.arange(len(passed), device=passed.device), passed]).mean()


def _gaps(method: Matching, d: Draw, f_fake: Tensor, f_teacher: Tensor) -> dict[str, Tensor]:
    """`rms |f_psi - f_phi|` per segment (and step count, where there are several): the matching gradient before normalisation."""
    gap = (f_fake - f_teacher).detach().square().flatten(1).mean(1)
    count = f"{d.steps}_" if len(method.counts) > 1 else ""
    of = [(k, (d.segment == k).to(gap)) for k in range(d.steps) if bool((d.segment == k).any())]
    return {f"gap_{count}{k}": ((gap * here).sum() / here.sum()).sqrt() for k, here in of}
