"""Distribution matching along the student's own trajectory.

TDM (alg. 1), TDM's variants and rival methods are settings of one method: which state is matched (the noisy
landing state or the clean estimate, diffused over the state's segment or over all times), by which
divergence, in how many steps.

One sample gives the updates of both student and fake score: roll the student out to a segment, take the step
`t_{m+1} -> t_m` with gradient, diffuse the matched state to a time tau, and compare there the clean estimates
of the fake score and the guided teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..backbones.base import Cond, rows
from ..config_fields import WEIGHT, OneOf, Range
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.prediction import Row
from ..core.rollout import segment_starts
from ..core.schedule import Schedule, diffuse, expand, posterior, transition
from ..core.solvers import SOLVERS, Denoise, sample, solver_named, step
from ..core.weighting import WEIGHTINGS
from ..objectives.adversarial import GAN_LOSSES, gradient_penalty
from ..objectives.denoising import denoising, density_ratio, martingale, transition_target
from ..objectives.divergences import DIVERGENCES
from ..objectives.f_divergences import ratio_weight
from ..objectives.matched_state import MatchedState
from ..objectives.regression import REGRESSION_LOSSES, landing_target
from ..objectives.reverse_kl import SURROGATE_LOSSES
from ..objectives.rewards import advantages, group_preference
from ..roles.roles import SURROGATE, Role, Roles
from ..transfer import sent
from ..words import speaks_python
from .matching_settings import FakeScoreConfig, FirstStepConfig, GanConfig, MatchConfig, RewardConfig
from .method import (
    MOST_STEPS,
    Loss,
    Method,
    Needs,
    RealBatch,
    TrainBatch,
    TrajectoryBatch,
    draw_count,
    require_analytic_first_step,
    student_of,
)
from .names import require_name
from .trajectory_imitation import absorb_head

LONGEST_MOVE = 0.01  # of the path, from a state to a cleaner one; what public code of AC-DMD takes


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class DistributionMatching(Method):
    """Settings of distribution matching; the defaults are TDM's.

    Raises ValueError for invalid settings.
    """

    name: str = "tdm"

    sample_solver: Annotated[str, OneOf(SOLVERS)] | None = None
    """Solver that the student is sampled with (TDM samples with DPM-Solver++); by default the one of training."""

    random_times: bool = False
    """Train each iteration on inner times drawn at random (CDM, arXiv 2605.06376); sampling keeps the even grid."""

    ladder: tuple[Annotated[int, Range(1, MOST_STEPS)], ...] = ()
    """Step counts that the training climbs down before `steps`, such as [16, 8]: equal parts of its iterations each
    (FastVideo's trainer of TDM)."""

    condition: bool = True
    """Condition student and fake score on the step count, where there are several."""

    loss: Annotated[str, OneOf(SURROGATE_LOSSES)] = "huber"
    """Surrogate loss of the reverse KL (eq. 6 and 11)."""

    match: MatchConfig = MatchConfig()
    """What is matched, where, and by which divergence."""

    fake: FakeScoreConfig = FakeScoreConfig()
    """How the fake score is trained."""

    warmup: Annotated[int, Range(0)] = 100
    """Iterations at the start that train the fake score alone."""

    gan: GanConfig = GanConfig()
    """Adversarial term on real images."""

    first_step: FirstStepConfig = FirstStepConfig()
    """Regression of the first step, in place of matching."""

    reward: RewardConfig = RewardConfig()
    """Reward beside matching."""

    regression_weight: Annotated[float, WEIGHT] = 0.0
    """Weight of the regression on the teacher's trajectories (DMD, arXiv 2311.18828, eq. 9), from whose noise students
    then start."""

    init_head: Literal["keep", "absorb", "drop"] = "keep"
    """Head of the student that training is initialized from: train it on, absorb it into the weights during the
    warm-up, or drop it."""

    analytic_first_step: bool = False
    """Take the first direction analytically, without a network evaluation (AFS, arXiv 2210.05475)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regression_weight and self.gan.weight:
            raise ValueError(
                f"method.regression_weight: got {self.regression_weight} with method.gan.weight={self.gan.weight}; "
                "a recipe has data for one of them, set the other to 0"
            )
        stochastic = SOLVERS[self.solver].stochastic
        if self.regression_weight and stochastic:
            raise ValueError(
                f"method.regression_weight: got a weight with method.solver={self.solver}, whose states are random; "
                "set it to 0, or the solver to ddim"
            )
        self._check_reward(stochastic)
        self._check_first_step()
        self._check_ratio()
        if self.random_times and (self.regression_weight or self.shift != 1):
            other = "regression_weight" if self.regression_weight else "shift"
            raise ValueError(
                f"method.random_times: got true with method.{other}={getattr(self, other):g}, "
                f"which is for fixed times; set it to false, or {other} to {1 if other == 'shift' else 0}"
            )
        if self.ladder and (self.regression_weight or len(self.counts) > 1):
            other = "regression_weight" if self.regression_weight else "steps"
            raise ValueError(
                f"method.ladder: got {list(self.ladder)} with method.{other}={getattr(self, other)}, "
                "which is for fixed step counts; leave it out, or "
                + ("set regression_weight to 0" if self.regression_weight else "choose one step count")
            )
        if self.init_head == "absorb" and not self.warmup:
            raise ValueError(
                "method.init_head: got absorb with method.warmup=0, and it is absorbed during the warm-up; "
                "set method.warmup above 0, e.g. 100"
            )
        if self.init_head == "absorb" and stochastic:
            raise ValueError(
                f"method.init_head: got absorb with method.solver={self.solver}, whose states are random; "
                "set it to drop, or the solver to ddim"
            )
        require_analytic_first_step(self)
        if self.name == "tdm":  # the default name: settings of another preset get that preset's name
            object.__setattr__(self, "name", self._own_name())
        require_name(self)

    def _check_first_step(self) -> None:
        if not self.first_step.weight:
            return
        if 1 in self.counts:
            raise ValueError(
                f"method.first_step.weight: got {self.first_step.weight:g} with method.steps={self.steps}, of whose "
                "one step nothing would be matched; set it to 0, or choose step counts from 2"
            )
        if self.analytic_first_step:
            raise ValueError(
                f"method.first_step.weight: got {self.first_step.weight:g} with method.analytic_first_step=true, where "
                "the first step has nothing to train; set one of them to 0 or false"
            )

    def _check_ratio(self) -> None:
        wanted = "non-saturating"  # its logit is the logarithm of the ratio
        if DIVERGENCES[self.match.divergence].ratio_weight is None or (self.gan.weight and self.gan.loss == wanted):
            return
        raise ValueError(
            f"method.match.divergence: got {self.match.divergence}, which is known by a discriminator; set "
            f"method.gan.weight above 0 and method.gan.loss={wanted}, or choose reverse-kl"
        )

    def _check_reward(self, stochastic: bool) -> None:
        if not self._prefers:
            return
        for option, got, wanted, why in (
            ("solver", self.solver if stochastic else "", "ddim", "states that do not determine the image"),
            ("match.state", self.match.state, "noisy", "states that are not those of the trajectory"),
            ("match.divergence", self.match.divergence, "reverse-kl", "scores that are not a sum of terms"),
        ):
            if got not in ("", wanted):
                raise ValueError(
                    f"method.reward.by: got preference with method.{option}={got}, which has {why}; "
                    f"set it to gradient, or {option.rpartition('.')[2]} to {wanted}"
                )

    def _own_name(self) -> str:
        stochastic = SOLVERS[self.solver].stochastic
        fisher, clean = (
            self.match.divergence == "fisher",
            self.match.state == "clean" and self.match.tau_range == "full",
        )
        if clean:
            one = not fisher and self.counts == (1,) and self.fake.updates == 1 and not stochastic
            dmd2 = stochastic and not self.fake.share_noised_sample
            return "sid" if fisher else "diff-instruct" if one else "dmd2" if dmd2 else "tdm"
        if self.match.state != "noisy" or self.match.divergence not in ("reverse-kl", "fisher"):
            return "tdm"
        return "tdm-fisher" if fisher else "tdm-unify" if len(self.counts) > 1 else "tdm"

    @property
    def sampler(self) -> str:
        return self.sample_solver or self.solver

    @property
    def against_per_step(self) -> tuple[str, str, str, str] | None:
        if len(self.counts) > 1 or self.counts == (1,):
            got = str(list(self.counts) if len(self.counts) > 1 else 1)
            return "steps", got, "one step count of several steps", "set it to one count from 2, such as 4"
        for option, value, off, needs in (
            ("random_times", self.random_times, False, "fixed times"),
            ("ladder", list(self.ladder), [], "one step count"),
            ("analytic_first_step", self.analytic_first_step, False, "a network in every step"),
            ("fake.pull", self.fake.pull, 0.0, "a fake score that is pulled to no student, for there are several"),
        ):
            if value != off:
                return option, str(value).lower(), needs, "leave it out"
        return None

    def count_at(self, iteration: int, iterations: int, rng: torch.Generator) -> int:
        rung = iteration * (len(self.ladder) + 1) // iterations
        return self.ladder[rung] if rung < len(self.ladder) else draw_count(self.steps, rng)

    def after(self, roles: Roles, iteration: int) -> None:
        if self.fake.pull and iteration >= self.warmup:
            roles.pull_fake(self.fake.pull)

    @property
    def condition_values(self) -> tuple[int, ...]:
        return self.counts if self.condition and len(self.counts) > 1 else ()

    @property
    def needs(self) -> Needs:
        """What the method needs besides student, teacher and prompts.

        Always a fake score; for the adversarial term also a discriminator and images; for the regression also
        the teacher's trajectories.
        """
        adversarial = self.gan.weight > 0
        return Needs(
            fake=True,
            adversary=adversarial,
            images=adversarial,
            trajectories=self.regression_weight > 0,
            length=bool(self.ladder),
            reward=self.reward.weight > 0,
            surrogate=self._prefers,
        )

    @property
    def _prefers(self) -> bool:
        return self.reward.weight > 0 and self.reward.by == "preference"

    @property
    def group(self) -> int:
        return self.reward.group if self._prefers else 1

    @property
    def metrics(self) -> tuple[str, ...]:
        several = len(self.counts) > 1
        served = self.counts if several else (max(self.counts[0], *self.ladder, 1),)
        gaps = (f"gap_{f'{count}_' if several else ''}{k}" for count in served for k in range(count))
        adversarial = ("discriminator_loss", "gan_loss") if self.gan.weight else ()
        return (
            "student_loss",
            "fake_loss",
            *adversarial,
            *(("regression_loss",) if self.regression_weight else ()),
            *(("first_step_loss",) if self.first_step.weight else ()),
            *(("reward",) if self.reward.weight else ()),
            *(("surrogate_loss",) if self._prefers else ()),
            *gaps,
        )

    @property
    def updated(self) -> tuple[Role, ...]:
        surrogate, judge = self._prefers, self.gan.weight > 0
        return ("student", "fake", *((SURROGATE,) if surrogate else ()), *(("discriminator",) if judge else ()))

    @property
    def separate(self) -> bool:
        return not DIVERGENCES[self.match.divergence].scores_carry_gradient

    def one_step(self) -> "DistributionMatching":
        """Return the one-step method, which needs as much memory.

        The steps before the step with gradient hold less memory than that step.
        """
        return replace(
            self,
            name="",
            warmup=0,
            steps=1,
            ladder=(),
            init_head="keep",
            analytic_first_step=False,
            first_step=FirstStepConfig(),
        )

    def losses(self, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
        yield from matching_losses(self, roles, batch)
        if batch.iteration < self.warmup and roles.head_to_absorb is not None:
            yield from absorb_head(self, roles, batch)


class NoisedSample(NamedTuple):
    """A matched state and the diffused state x_tau.

    `landed`, `x_m`, `x0` and `x_tau` may carry the student's gradient.
    """

    cond: Cond
    times: Tensor  # [K + 1] the grid of this iteration, on the CPU
    steps: int  # K of this iteration
    segment: Tensor  # [B] 0 .. K-1, ascending, 0 starts from noise; on the CPU
    start: Tensor  # [B] time at which the step starts
    landing: Tensor  # [B] time at which the step ends
    begun: Tensor | None  # state where the step starts, kept where the first step is regressed
    t: Tensor  # [B] time of x_m: the landing time, or the time of clean data
    tau: Tensor  # [B]
    landed: Tensor  # state where the step ends
    x_m: Tensor  # matched state
    x0: Tensor  # the student's clean estimate
    e: Tensor  # transition noise
    x_tau: Tensor


def draw(
    method: DistributionMatching,
    roles: Roles,
    cond: Cond,
    batch: int,
    rng: torch.Generator,
    with_gradient: bool,
    steps: int | None = None,
    init_noise: Tensor | None = None,
    host: torch.Generator | None = None,
) -> NoisedSample:
    """Draw a noised sample: roll out, step and diffuse.

    Steps 1 to 3 of algorithm 1. The draw is deterministic given `rng` and `host`, which draws what the CPU needs
    (default: `rng`); `init_noise` [B, ...] replaces the initial noise.
    """
    schedule, shape, host = roles.backbone.schedule, roles.backbone.shape, host or rng
    steps = steps or draw_count(method.steps, host)
    times = timegrid.random(schedule, steps, host) if method.random_times else method.times(schedule, steps)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, device=rng.device)

    solver = solver_named(method.solver, noise)
    x = noise(torch.empty((batch, *shape))) * schedule.start_std if init_noise is None else init_noise
    # Without a head, an analytic first step has nothing to train.
    untrained = int(method.analytic_first_step and roles.head is None)
    segment = untrained + timegrid.draw_segments(batch, steps - untrained, host).cpu()
    student = partial(student_of, method, roles, steps=steps)
    calls = steps - 1 if roles.sharded else 0  # as many calls as any process may need
    start, history = segment_starts(
        lambda k, r: student(rows(cond, r), step=torch.tensor([k])),
        schedule,
        x,
        times,
        segment,
        solver,
        roles.head,
        calls,
    )
    high, landing = sent(torch.stack([times[segment], times[segment + 1]]), x.device)
    with torch.set_grad_enabled(with_gradient):
        denoise = student(cond, always=roles.sharded, step=segment)
        landed, done = step(solver, schedule, denoise(start, high), high, landing, history, roles.head)
        clean, x0 = method.match.state == "clean", done.pred.x0 if roles.head is None else done.used.x0
        x_m = x0 if clean else landed
    tau = _draw_tau(method.match, schedule, landing, high, rng)
    t = torch.full_like(landing, schedule.t_clean) if clean else landing
    e = noise(x)
    r, beta = transition(schedule, t, tau)
    with torch.set_grad_enabled(with_gradient):
        x_tau = expand(r, x) * x_m + expand(beta, x) * e
    return NoisedSample(
        cond=cond,
        times=times,
        steps=steps,
        segment=segment,
        start=high,
        landing=landing,
        begun=start if method.first_step.weight else None,
        t=t,
        tau=tau,
        landed=landed,
        x_m=x_m,
        x0=x0,
        e=e,
        x_tau=x_tau,
    )


def _draw_tau(match: MatchConfig, schedule: Schedule, landing: Tensor, high: Tensor, rng: torch.Generator) -> Tensor:
    """Draw tau `[B]` in (low, high].

    The range starts at the landing time (`full`: at clean data) and ends at the segment's start (`segment`)
    or at pure noise. `tau_min` and `tau_max` narrow the range, as far as times remain.
    """
    low = torch.full_like(landing, schedule.t_clean) if match.tau_range == "full" else landing
    top = high if match.tau_range == "segment" else torch.full_like(high, schedule.t_max)
    least, most = (timegrid.time_at(schedule, torch.full_like(high, u)) for u in (match.tau_min, match.tau_max))
    top = torch.where(most > low, top.minimum(most), top)
    least = least.minimum(top - schedule.resolution)
    return timegrid.draw_between(schedule, torch.maximum(low, least), top, rng)


def fake_loss(method: DistributionMatching, schedule: Schedule, row: Row, d: NoisedSample, f_fake: Tensor) -> Tensor:
    """Return the denoising regression of the fake score at x_tau.

    Step 4 of algorithm 1, eq. 7. The target is the clean estimate or the transition noise.
    """
    weight = WEIGHTINGS[method.fake.weight](schedule, row, d.tau, method.fake.snr_clip)
    if method.fake.density_ratio:
        weight = weight * density_ratio(schedule, d.x_tau, d.x0, d.e, d.t, d.tau)
    if method.fake.target == "clean" or method.fake.input == "clean":
        return denoising(f_fake, d.x0, weight).mean()
    goal, precision = transition_target(schedule, d.x_m.detach(), d.e, d.t, d.tau)
    return denoising(f_fake, goal, precision * weight).mean()


def student_loss(
    method: DistributionMatching, schedule: Schedule, d: NoisedSample, f_fake: Tensor, f_teacher: Tensor
) -> Tensor:
    """Return the divergence of student and teacher at x_tau per sample.

    Step 5 of algorithm 1. Returns [B].
    """
    state = MatchedState(schedule, d.x_m, d.x0, d.e, d.t, d.tau, f_teacher, f_fake)
    return DIVERGENCES[method.match.divergence].loss(state, method.loss, method.match.fisher_correction)


def consistency_loss(
    schedule: Schedule, fake: Denoise, d: NoisedSample, f_fake: Tensor, rng: torch.Generator
) -> Tensor:
    """Return how far the fake score is from its successors' mean.

    Two independent draws of a state that is cleaner by up to a hundredth of the path, given the clean estimate f_fake
    at x_tau. Gradients flow through the estimates alone.

    Source: AC-DMD, arXiv 2605.26108.
    """
    move = LONGEST_MOVE * torch.rand(d.tau.shape, generator=rng, dtype=torch.float64, device=d.tau.device)
    s = timegrid.time_at(schedule, (schedule.fraction(d.tau) - move).clamp(min=0))
    s = torch.minimum(s, d.tau - schedule.resolution).clamp(min=schedule.t_clean)
    x_tau, x0 = d.x_tau.detach(), f_fake.detach()
    with torch.no_grad():
        drawn = [
            posterior(schedule, x_tau, x0, d.tau, s, torch.randn(x0.shape, generator=rng, device=rng.device).to(x0))
            for _ in range(2)
        ]
    first, second = (fake(x, s).x0 for x in drawn)
    return martingale(f_fake, first, second).mean()


def first_step_loss(method: DistributionMatching, roles: Roles, d: NoisedSample, null: Cond) -> tuple[Tensor, Tensor]:
    """Return the regression of the first step on the teacher.

    `weight mean (x0 - x0*)^2` with the clean estimate x0* whose DDIM step from the sample's noise lands where the
    teacher's guided steps do. Returns which samples [B] are at their first step, on their device, and the losses [B],
    which are 0 for the others.

    Source: DP-DMD, arXiv 2602.03139, for any schedule.
    """
    schedule = roles.backbone.schedule
    count = int((d.segment == 0).sum())  # on the CPU; segments ascend, so these come first
    own = slice(0, max(count, 1))  # as many calls in every process
    times = timegrid.between(schedule, d.times[0], d.times[1], method.first_step.teacher_steps)
    assert d.begun is not None
    begun = d.begun[own].detach()
    with torch.no_grad():
        teacher = roles.teacher(rows(d.cond, own), null, method.guidance)
        *_, last = sample(teacher, schedule, begun, times, SOLVERS["ddim"])
        target = landing_target(schedule, begun, last.x, d.start[own], d.landing[own])
    (first,) = sent((d.segment == 0)[None], d.x0.device)
    losses = method.first_step.weight * REGRESSION_LOSSES["l2"](d.x0[own], target)
    return first, torch.cat([losses, losses.new_zeros(len(first) - len(losses))])


def guidance_loss(
    method: DistributionMatching, roles: Roles, d: NoisedSample, null: Cond, rng: torch.Generator
) -> Tensor:
    """Return the loss of guidance as a term of its own.

    The gradient on the matched state is `-(f_guided - f_cond) / n` at a tau of its own, with the teacher's guided and
    conditional clean estimates and DMD's normaliser n of the guided one. Together with the divergence from the
    unguided teacher at the same tau and with the same n, that is the divergence from the guided teacher.

    Source: decoupled DMD, arXiv 2511.22677.
    """
    schedule, match = roles.backbone.schedule, method.match
    ranges = replace(match, guidance_tau=None, tau_range="to_noise") if match.guidance_tau == "above" else match
    tau = _draw_tau(ranges, schedule, d.landing, d.start, rng)
    e = torch.randn(d.x_m.shape, generator=rng, device=rng.device)
    r, beta = transition(schedule, d.t, tau)
    with torch.no_grad():
        x_tau = expand(r, e) * d.x_m + expand(beta, e) * e
        f_guided = roles.teacher(d.cond, null, method.guidance)(x_tau, tau).x0
        f_cond = roles.teacher(d.cond, null, Guidance())(x_tau, tau).x0
    return student_loss(method, schedule, d._replace(tau=tau, e=e, x_tau=x_tau), f_cond, f_guided).mean()


def discriminator_loss(
    method: DistributionMatching, roles: Roles, d: NoisedSample, real: RealBatch, of_features: bool = False
) -> Tensor:
    """Return the loss of the discriminator (eq. 16).

    Real data diffused to the same tau are compared with x_tau, on features of the teacher or the fake score. With
    `of_features` its gradient trains these, too, without the penalty.
    """
    assert roles.discriminator is not None
    discriminator, gan_loss, role = roles.discriminator, GAN_LOSSES[method.gan.loss], method.gan.features
    x_real, x_tau = diffuse(roles.backbone.schedule, real.x0, d.tau, d.e), d.x_tau.detach()
    with torch.set_grad_enabled(of_features):
        real_tokens = roles.tokens(role, x_real, d.tau, real.cond, d.steps)
        fake_tokens = roles.tokens(role, x_tau, d.tau, d.cond, d.steps)
    penalised = method.gan.r1 > 0 and not of_features
    if penalised:
        real_tokens = [f.requires_grad_() for f in real_tokens]
    logits = discriminator.logits(real_tokens, d.tau, d.steps)
    value = gan_loss.real(logits) + gan_loss.fake(discriminator.logits(fake_tokens, d.tau, d.steps))
    if penalised:
        gradients = torch.autograd.grad(logits.mean(1).sum(), real_tokens, create_graph=True)
        value = value + method.gan.r1 * gradient_penalty(list(gradients))
    return value.mean()


def student_logits(method: DistributionMatching, roles: Roles, d: NoisedSample) -> Tensor:
    """Return the discriminator's logits [B, N] of the student's x_tau.

    The gradient flows through the features into x_tau.
    """
    assert roles.discriminator is not None
    tokens = roles.tokens(method.gan.features, d.x_tau, d.tau, d.cond, d.steps)
    return roles.discriminator.logits(tokens, d.tau, d.steps)


def adversarial_loss(method: DistributionMatching, logits: Tensor) -> Tensor:
    """Return the student's adversarial loss of its logits [B, N]."""
    return GAN_LOSSES[method.gan.loss].student(logits).mean()


def matching_losses(method: DistributionMatching, roles: Roles, batch: TrainBatch) -> Iterator[Loss]:
    """Yield the updates of one iteration: fake score, discriminator, student.

    With a shared sample, the last update of the fake score and the update of the student come from one x_tau
    *and one forward pass* of the fake score, which precedes both updates. An iteration then costs (K+1)/2 + 2
    (student) + 2 (guided teacher) + 3 (fake) network calls; a backward pass counts as two calls. A divergence
    whose scores carry gradient shares x_tau alone and costs 3 + 2 x 2 calls more.
    """
    schedule, row, rng = roles.backbone.schedule, roles.backbone.row, batch.rng
    warming_up, walk = batch.iteration < method.warmup, batch.trajectories
    cond, init_noise = (batch.cond, None) if walk is None else (walk.cond, walk.states[:, 0])
    steps = batch.steps or draw_count(method.steps, batch.host_rng)
    drawn = partial(
        draw, method, roles, cond, batch.batch, rng, steps=steps, init_noise=init_noise, host=batch.host_rng
    )
    fake = roles.denoise("fake", cond, steps)
    shared = method.fake.share_noised_sample

    def fake_update(d: NoisedSample, f_fake: Tensor, together: bool = False) -> Loss:
        value = fake_loss(method, schedule, row, d, f_fake)
        logged = {"fake_loss": value.detach()}
        if method.fake.consistency:
            value = value + method.fake.consistency * consistency_loss(schedule, fake, d, f_fake, rng)
        if method.gan.weight and method.gan.features == "fake" and not warming_up:
            assert batch.images is not None
            judged = discriminator_loss(method, roles, d, batch.images, of_features=True)
            value = value + method.gan.feature_weight * judged
        return Loss("fake", value, logged, together)

    def update_fake(d: NoisedSample) -> Loss:
        if method.fake.input == "clean":
            d = d._replace(x_tau=diffuse(schedule, d.x0, d.tau, d.e))
        return fake_update(d, fake(d.x_tau.detach(), d.tau).x0)

    for _ in range(method.fake.updates if warming_up or not shared else method.fake.updates - 1):
        yield update_fake(drawn(with_gradient=False))
    if method.needs.surrogate:
        yield surrogate_loss(method, roles, batch, steps)
    if warming_up:
        return
    d = drawn(with_gradient=True)
    apart = method.match.guidance_tau is not None
    teacher = roles.teacher(cond, batch.null, Guidance() if apart else method.guidance)
    with_gradient = DIVERGENCES[method.match.divergence].scores_carry_gradient
    one_pass = shared and not with_gradient and method.fake.input == "noisy"
    if shared and not one_pass:
        yield update_fake(d)
    if with_gradient:
        f_teacher, f_fake = teacher(d.x_tau, d.tau).x0, fake(d.x_tau, d.tau).x0
    else:
        with torch.no_grad():
            f_teacher = teacher(d.x_tau, d.tau).x0
        with torch.set_grad_enabled(one_pass):
            f_fake = fake(d.x_tau.detach(), d.tau).x0
    each = student_loss(method, schedule, d, f_fake, f_teacher)
    metrics = {"student_loss": each.detach().mean(), **_gaps(method, d, f_fake, f_teacher)}
    value = each.new_zeros(())
    if apart:
        value = value + method.match.guidance_weight * guidance_loss(method, roles, d, batch.null, rng)
    if method.reward.weight:
        prompts = batch.prompts if walk is None else walk.prompts
        term, logged = reward_term(method, roles, d, batch.null, prompts)
        value, metrics = value + method.reward.weight * term, metrics | logged
    if one_pass:
        yield fake_update(d, f_fake, together=not method.gan.weight)
    if method.gan.weight:
        assert batch.images is not None
        judged = discriminator_loss(method, roles, d, batch.images)
        yield Loss("discriminator", judged, {"discriminator_loss": judged.detach()})
        logits = student_logits(method, roles, d)
        adversarial = adversarial_loss(method, logits)
        value, metrics = value + method.gan.weight * adversarial, metrics | {"gan_loss": adversarial.detach()}
        if (weight := DIVERGENCES[method.match.divergence].ratio_weight) is not None:
            each = each * ratio_weight(weight, logits)
    if method.first_step.weight:
        first, regressed = first_step_loss(method, roles, d, batch.null)
        each = torch.where(first, regressed, each)
        metrics |= {"first_step_loss": regressed.detach().sum() / first.sum().clamp(min=1)}
    value = value + each.mean()
    if walk is not None:
        regression = regression_loss(method, schedule, d, walk)
        value, metrics = (
            value + method.regression_weight * regression,
            metrics | {"regression_loss": regression.detach()},
        )
    yield Loss("student", value, metrics)


def scores_of(roles: Roles, x0: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """Return the rewards [B] of clean states, in single precision.

    Raises ValueError for a reward of another shape.
    """
    assert roles.reward is not None
    found = roles.reward(roles.backbone.decode(x0), prompts)
    if found.shape != (len(x0),):
        raise ValueError(f"reward: got a tensor {list(found.shape)} for {len(x0)} images, allowed is one number each")
    return found.to(x0.device).float()


def surrogate_loss(method: DistributionMatching, roles: Roles, batch: TrainBatch, steps: int) -> Loss:
    """Return the update of the network that learns a reward from preferences.

    The student draws whole images, and their scores make the preferences. Each group has a segment, a tau and a noise
    of its own; the states where its trajectories land are diffused there, and denoising errors are those of the
    transition's exact target.

    Source: TDM-R1, arXiv 2603.07700.
    """
    schedule, group, rng = roles.backbone.schedule, method.reward.group, batch.rng

    def noise(count: int) -> Tensor:
        return torch.randn((count, *roles.backbone.shape), generator=rng, device=rng.device)

    x, groups = noise(batch.batch) * schedule.start_std, batch.batch // group
    times = timegrid.random(schedule, steps, batch.host_rng) if method.random_times else method.times(schedule, steps)
    with torch.no_grad():
        student = student_of(method, roles, batch.cond, steps)
        states = [s.x for s in sample(student, schedule, x, times, solver_named(method.solver), roles.head)]
        rewards = scores_of(roles, states[-1], batch.prompts)
    segment = timegrid.draw_segments(groups, steps, batch.host_rng).cpu()
    high, landing = sent(torch.stack([times[segment], times[segment + 1]]), x.device)
    tau = _draw_tau(method.match, schedule, landing, high, rng)
    landed = torch.cat([states[int(k) + 1][i * group : (i + 1) * group] for i, k in enumerate(segment)])
    landing, tau, e = (v.repeat_interleave(group, 0) for v in (landing, tau, noise(groups)))
    r, beta = transition(schedule, landing, tau)
    x_tau = expand(r, x) * landed + expand(beta, x) * e
    goal, precision = transition_target(schedule, landed, e, landing, tau)
    weight = precision * WEIGHTINGS[method.fake.weight](schedule, roles.backbone.row, tau, method.fake.snr_clip)
    with torch.no_grad():
        f_teacher = roles.teacher(batch.cond, batch.null, Guidance())(x_tau, tau).x0
    f_surrogate = roles.denoise(SURROGATE, batch.cond, steps)(x_tau, tau).x0
    errors, reference = (denoising(f, goal, weight) for f in (f_surrogate, f_teacher))
    loss = group_preference(errors, reference, advantages(rewards, group), group, method.reward.strength).mean()
    return Loss(SURROGATE, loss, {"surrogate_loss": loss.detach(), "reward": rewards.mean()})


def reward_term(
    method: DistributionMatching, roles: Roles, d: NoisedSample, null: Cond, prompts: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reward's part of the student's loss.

    It is before its weight, and comes with what to log.

    By gradient it is minus the reward of the clean estimate that the step makes. By preference it pulls the matched
    state along `f_surrogate - f_phi` at x_tau, with the same surrogate loss as matching: a surrogate goes far from the
    teacher, and `huber` takes its direction alone.
    """
    if not method.needs.surrogate:
        rewards = scores_of(roles, d.x0, prompts)
        if not rewards.requires_grad:
            raise ValueError(
                "method.reward.by: got gradient, but this reward has none; set method.reward.by=preference"
            )
        return -rewards.mean(), {"reward": rewards.mean().detach()}
    with torch.no_grad():
        f_teacher = roles.teacher(d.cond, null, Guidance())(d.x_tau, d.tau).x0
        f_surrogate = roles.denoise(SURROGATE, d.cond, d.steps)(d.x_tau, d.tau).x0
    return student_loss(method, roles.backbone.schedule, d, f_teacher, f_surrogate).mean(), {}


def regression_loss(method: DistributionMatching, schedule: Schedule, d: NoisedSample, walk: TrajectoryBatch) -> Tensor:
    """Return the regression on the teacher's trajectories.

    `mean |x - x_teacher|` where the student's steps land; the teacher's trajectories start from the same
    noise.
    """
    passed = (walk.times[None] - method.times(schedule, d.steps)[d.segment + 1, None]).abs().argmin(1)
    of, passed = sent(torch.stack([torch.arange(len(passed)), passed]), d.landed.device)
    return REGRESSION_LOSSES["l1"](d.landed, walk.states[of, passed]).mean()


def _gaps(method: DistributionMatching, d: NoisedSample, f_fake: Tensor, f_teacher: Tensor) -> dict[str, Tensor]:
    """Return the gap `rms |f_psi - f_phi|` per segment.

    The gap is the matching gradient before normalisation. With several step counts the names include the step
    count.
    """
    gap = (f_fake - f_teacher).detach().square().flatten(1).mean(1)
    count = f"{d.steps}_" if len(method.counts) > 1 else ""
    drawn = torch.unique(d.segment)
    here = sent((d.segment == drawn[:, None]).to(gap.dtype), gap.device)
    means = ((gap * here).sum(1) / here.sum(1)).sqrt()
    return {f"gap_{count}{k}": mean for k, mean in zip(drawn.tolist(), means, strict=True)}
