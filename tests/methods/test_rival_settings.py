"""Settings that rivals ship: each equals its closed form, and is off by default."""

import pytest
import torch
from torch import Tensor

from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.prediction import Split
from fewstep.core.schedule import EDM, VP, Flow, Schedule, posterior, transition
from fewstep.core.solvers import SOLVERS, sample
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    consistency_loss,
    draw,
    fake_loss,
    first_step_loss,
    guidance_loss,
    matching_losses,
    student_loss,
)
from fewstep.methods.matching_settings import FakeScoreConfig, FirstStepConfig, GanConfig, MatchConfig
from fewstep.objectives.denoising import density_ratio, martingale
from fewstep.objectives.divergences import DIVERGENCES
from fewstep.objectives.f_divergences import RATIO_WEIGHTS, ratio_weight
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.student.student import Origin, student_card
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.settings import require_unchanged, settings_of

from .. import tiny
from .common import BATCH, conditions, seed, train_batch, trained
from .test_adversary import adversaries, real_data


def test_guidance_apart_is_the_guided_match_where_tau_and_normaliser_are_one() -> None:
    """DM + guidance = the match of the guided teacher: `(psi - cond) - (guided - cond) = psi - guided`."""
    roles, guidance = trained(), Guidance(scale=3.0)
    cond, null = conditions(roles.backbone)
    with torch.no_grad():
        d = draw(DistributionMatching(), roles, cond, BATCH, seed(), with_gradient=False)
        fake = roles.denoise("fake", cond)(d.x_tau, d.tau).x0
        guided, plain = (roles.teacher(cond, null, g)(d.x_tau, d.tau).x0 for g in (guidance, Guidance()))
    method = DistributionMatching(loss="l2", guidance=guidance)

    def pull(f_fake: Tensor, f_teacher: Tensor) -> Tensor:
        """Return the gradient on the matched state without its normaliser."""
        x = d.x_m.clone().requires_grad_(True)
        value = student_loss(method, roles.backbone.schedule, d._replace(x_m=x), f_fake, f_teacher).mean()
        normaliser = (d.x0 - f_teacher).abs().flatten(1).mean(1)
        return torch.autograd.grad(value, x)[0] * normaliser.view(-1, *[1] * (x.ndim - 1)) * len(x)

    torch.testing.assert_close(pull(fake, plain) + pull(plain, guided), pull(fake, guided), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pull(fake, guided), fake - guided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["own", "above"])
def test_guidance_apart_has_a_tau_of_its_own(where: str) -> None:
    roles = trained()
    cond, null = conditions(roles.backbone)
    method = DistributionMatching(match=MatchConfig(guidance_tau=where), guidance=Guidance(scale=3.0))  # type: ignore[arg-type]
    d, seen = draw(method, roles, cond, BATCH, seed(), with_gradient=True), list[Tensor]()
    handle = roles.backbone.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    value = guidance_loss(method, roles, d, null, seed(1))
    handle.remove()
    tau = seen[0][:BATCH].double()  # with guidance, then without
    assert torch.equal(seen[1].double(), tau) and not torch.equal(tau, d.tau)
    assert bool((tau > d.landing).all())
    assert bool((tau <= d.start).all()) == (where == "own")
    assert any(g is not None and bool(g.any()) for g in _gradients(value, roles.trained["student"].values()))


def _gradients(value: Tensor, parameters: object) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, list(parameters), allow_unused=True)  # type: ignore[call-overload]


def test_guidance_of_one_pulls_nowhere() -> None:
    roles = trained()
    cond, null = conditions(roles.backbone)
    method = DistributionMatching(match=MatchConfig(guidance_tau="own"), guidance=Guidance())
    d = draw(method, roles, cond, BATCH, seed(), with_gradient=True)
    value = guidance_loss(method, roles, d, null, seed(1))
    assert all(g is None or not g.any() for g in _gradients(value, roles.trained["student"].values()))


def test_guidance_apart_is_a_term_of_reverse_kl_alone() -> None:
    with pytest.raises(ValueError, match=r"match\.guidance_tau: got own with .*fisher"):
        MatchConfig(divergence="fisher", guidance_tau="own")


@pytest.mark.parametrize("lora", [True, False])
def test_the_fake_score_is_pulled_by_its_share(lora: bool) -> None:
    """`psi <- 0.97 psi + 0.03 theta`, once the student moves."""
    roles = trained(share=lora)
    fake, student = ([p.detach().clone() for p in roles.trained[r].values()] for r in ("fake", "student"))
    method = DistributionMatching(warmup=5, fake=FakeScoreConfig(pull=0.03))
    method.after(roles, 4)
    assert all(torch.equal(a, b) for a, b in zip(fake, roles.trained["fake"].values(), strict=True))
    method.after(roles, 5)
    for before, other, now in zip(fake, student, roles.trained["fake"].values(), strict=True):
        torch.testing.assert_close(now, 0.97 * before + 0.03 * other)


def test_the_loop_pulls_once_an_iteration() -> None:
    """With a pull of 1 the fake score is the student, also over several batches."""
    teacher = tiny.denoiser()
    roles = make_roles(teacher, RolesConfig(lora=False))
    method = DistributionMatching(warmup=0, fake=FakeScoreConfig(pull=1.0))
    train = TrainConfig(iterations=2, batch=4, accumulate=2)
    for _ in distill(roles, method, embed(teacher, tiny.WORDS, None, ""), train):
        pass
    for p, q in zip(roles.trained["student"].values(), roles.trained["fake"].values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("schedule", [tiny.TABLE, EDM()])
def test_a_random_grid_is_a_grid_with_even_inner_fractions(schedule: object) -> None:
    """Inner fractions are ordered uniform draws: of K steps the i-th has the mean i / K."""
    rng, steps = seed(), 4
    grids = torch.stack([timegrid.check(schedule, timegrid.random(schedule, steps, rng)) for _ in range(400)])  # type: ignore[arg-type]
    fractions = schedule.fraction(grids[:, 1:-1]).mean(0)  # type: ignore[attr-defined]
    torch.testing.assert_close(fractions, torch.tensor([3, 2, 1]).double() / steps, rtol=0, atol=0.04)


def test_a_random_grid_never_repeats_a_time_of_a_table() -> None:
    most = int(tiny.TABLE.t_max - tiny.TABLE.t_clean)
    for steps in (1, 2, most - 1, most):
        assert bool((timegrid.random(tiny.TABLE, steps, seed()).diff() < 0).all())


def test_random_times_are_trained_and_even_ones_sampled() -> None:
    roles, method = trained(), DistributionMatching(random_times=True)
    cond, _ = conditions(roles.backbone)
    even = method.times(tiny.TABLE)
    drawn = [draw(method, roles, cond, BATCH, seed(k), with_gradient=False) for k in range(2)]
    starts = [set(d.start.tolist()) for d in drawn]
    assert starts[0] != starts[1] and all(not s <= set(even.tolist()) for s in starts)
    assert all(float(tiny.TABLE.t_max) in s for s in starts)
    torch.testing.assert_close(even, timegrid.uniform(tiny.TABLE, 4))
    with pytest.raises(ValueError, match=r"random_times: got .*shift=2"):
        DistributionMatching(random_times=True, shift=2.0)
    with pytest.raises(ValueError, match=r"random_times: got .*regression_weight=1"):
        DistributionMatching(random_times=True, regression_weight=1.0)


def test_a_ladder_is_climbed_down_in_equal_parts() -> None:
    method, rng = DistributionMatching(ladder=(16, 8)), seed()
    assert [method.count_at(i, 9, rng) for i in range(9)] == [16, 16, 16, 8, 8, 8, 4, 4, 4]
    assert method.needs.length and not DistributionMatching().needs.length
    assert {"gap_0", "gap_15"} <= set(method.metrics)
    assert [DistributionMatching(steps=2).count_at(i, 9, rng) for i in (0, 8)] == [2, 2]
    with pytest.raises(ValueError, match=r"ladder: got .16.* with .*steps=.4, 2"):
        DistributionMatching(steps=(4, 2), ladder=(16,))


def test_the_loop_climbs_the_ladder() -> None:
    teacher = tiny.denoiser()
    method = DistributionMatching(steps=1, ladder=(3,), warmup=0)
    roles = make_roles(teacher, RolesConfig(rank=2))
    found = list(distill(roles, method, embed(teacher, tiny.WORDS, None, ""), TrainConfig(iterations=2, batch=6)))
    gaps = [{k for k in step.metrics if k.startswith("gap")} for step in found]
    assert gaps == [{"gap_0", "gap_1", "gap_2"}, {"gap_0"}]


def test_a_sample_solver_is_the_cards_and_not_the_trainings() -> None:
    teacher = tiny.denoiser()
    roles = make_roles(teacher, RolesConfig(rank=2))
    method = DistributionMatching(steps=2, sample_solver="dpmpp")
    assert (method.solver, method.sampler) == ("ddim", "dpmpp")
    card = student_card(roles, method, Origin("own", "", 1, 0.0, "tdm"))
    assert card.solver == {"2": "dpmpp"}
    with pytest.raises(ValueError, match=r"sample_solver=renoise"):
        DistributionMatching(sample_solver="renoise", analytic_first_step=True)


def test_a_run_from_before_a_setting_was_added_resumes() -> None:
    teacher, method = tiny.denoiser(), DistributionMatching()
    roles = make_roles(teacher, RolesConfig(rank=2))
    data, train = embed(teacher, tiny.WORDS, None, ""), TrainConfig(iterations=2)
    now = settings_of(roles, method, data, train, 1, None, None)
    before = now | {"method": {k: v for k, v in now["method"].items() if k != "random_times"}}
    before["method"]["fake"] = {k: v for k, v in before["method"]["fake"].items() if k != "pull"}
    require_unchanged(before, now, "run")
    other = settings_of(roles, DistributionMatching(random_times=True), data, train, 1, None, None)
    with pytest.raises(ValueError, match=r"method\.random_times (f|F)alse -> (t|T)rue"):
        require_unchanged(before, other, "run")


SCHEDULES: list[Schedule] = [tiny.TABLE, EDM(), Flow()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_density_ratio_is_that_of_normal_densities(schedule: Schedule) -> None:
    u = torch.rand((5, 2), generator=seed(), dtype=torch.float64).sort(1).values
    t, tau = (timegrid.time_at(schedule, 0.05 + 0.9 * v) for v in u.T)
    tau = torch.maximum(tau, t + (schedule.resolution or 0.01))
    x0, x_t, noise = torch.randn((3, 5, 2, 3), generator=seed(1), dtype=torch.float64)
    r, beta = (v[:, None, None] for v in transition(schedule, t, tau))
    alpha, sigma = (v[:, None, None] for v in (schedule.alpha(tau), schedule.sigma(tau)))
    x_tau = r * x_t + beta * noise
    of = [torch.distributions.Normal(m, s).log_prob(x_tau) for m, s in ((alpha * x0, sigma), (r * x_t, beta))]
    expected = (of[0] - of[1]).flatten(1).mean(1).exp()
    torch.testing.assert_close(density_ratio(schedule, x_tau, x0, noise, t, tau), expected)


def test_the_density_ratio_of_clean_data_is_one() -> None:
    schedule = Flow()
    x0, noise = torch.randn((2, 5, 2, 3), generator=seed(), dtype=torch.float64)
    t, tau = torch.zeros(5).double(), torch.linspace(0.1, 1, 5).double()
    x_tau = schedule.alpha(tau)[:, None, None] * x0 + schedule.sigma(tau)[:, None, None] * noise
    torch.testing.assert_close(density_ratio(schedule, x_tau, x0, noise, t, tau), torch.ones(5).double())


def test_the_density_ratio_weighs_the_fake_score() -> None:
    roles = trained()
    cond, _ = conditions(roles.backbone)
    d = draw(DistributionMatching(), roles, {k: v[:1] for k, v in cond.items()}, 1, seed(), with_gradient=False)
    f, row = torch.zeros_like(d.x0), roles.backbone.row
    plain, weighed = (
        fake_loss(DistributionMatching(fake=FakeScoreConfig(density_ratio=on)), tiny.TABLE, row, d, f)
        for on in (False, True)
    )
    torch.testing.assert_close(weighed, plain * density_ratio(tiny.TABLE, d.x_tau, d.x0, d.e, d.t, d.tau)[0].float())
    for other in ({"input": "clean"}, {"target": "transition"}):
        with pytest.raises(ValueError, match=r"density_ratio: got (t|T)rue with "):
            FakeScoreConfig(density_ratio=True, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_posterior_draw_is_bayes(schedule: Schedule) -> None:
    """Mean and variance of `q(x_s | x_t, x0)`, and its mixture over x_t is `q(x_s | x0)`."""
    s, t = (timegrid.time_at(schedule, torch.tensor([u]).double()) for u in (0.3, 0.6))
    (r, beta), n = transition(schedule, s, t), 200_000
    x0, rng = torch.full((1,), 0.7, dtype=torch.float64), seed()
    noise, other = torch.randn((2, n), generator=rng, dtype=torch.float64)
    x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * noise
    x_s = posterior(schedule, x_t[None], x0.expand(1, n), t, s, other[None])[0]
    scale = float(schedule.sigma(s))
    torch.testing.assert_close(x_s.mean(), float(schedule.alpha(s)) * x0[0], atol=0.01 * scale, rtol=0)
    torch.testing.assert_close(x_s.std(), schedule.sigma(s)[0], rtol=0.01, atol=0)
    # x_t given x_s has the transition's own mean and noise.
    left = (x_t - r * x_s) / beta
    assert abs(float((left * (x_s - x_s.mean())).mean()) / scale) < 0.01
    torch.testing.assert_close(left.std(), torch.ones((), dtype=torch.float64), rtol=0.01, atol=0)


def test_the_exact_score_of_a_gaussian_is_consistent() -> None:
    """Its clean estimate is linear, so the mean over draws is the estimate itself; one draw's square is not 0."""
    schedule, tau = Flow(), torch.full((50_000,), 0.8, dtype=torch.float64)
    s = tau - 0.2

    def exact(x: Tensor, t: Tensor) -> Tensor:
        """Return `E[x0 | x]` of data of variance 1/4."""
        a, b = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return 0.25 * a / (0.25 * a**2 + b**2) * x

    alpha, sigma = schedule.alpha(tau)[:, None], schedule.sigma(tau)[:, None]
    x0, noise, a, b = torch.randn((4, 50_000, 1), generator=seed(), dtype=torch.float64)
    x = alpha * 0.5 * x0 + sigma * noise
    h = exact(x, tau)
    first, second = (exact(posterior(schedule, x, h, tau, s, e), s) for e in (a, b))
    spread = (h - first).square().mean()
    assert abs(float(martingale(h, first, second).mean())) < 0.02 * float(spread)
    shifted = martingale(h + 0.1, first, second).mean()  # the square of the bias
    torch.testing.assert_close(shifted, torch.tensor(0.01).double(), atol=0.02 * float(spread) + 2e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_consistency_trains_the_fake_score_on_cleaner_states(schedule: Schedule) -> None:
    roles = trained(backbone=tiny.denoiser(schedule=schedule))
    cond, _ = conditions(roles.backbone)
    d = draw(DistributionMatching(), roles, cond, BATCH, seed(), with_gradient=False)
    fake, seen = roles.denoise("fake", cond), list[Tensor]()

    def watched(x: Tensor, t: Tensor) -> Split:
        seen.append(t)
        assert not x.requires_grad
        return fake(x, t)

    value = consistency_loss(schedule, watched, d, fake(d.x_tau, d.tau).x0, seed(1))
    assert torch.equal(*seen) and bool((seen[0] < d.tau).all())
    assert bool((schedule.fraction(d.tau) - schedule.fraction(seen[0]) < 0.012).all())
    assert any(g is not None and bool(g.any()) for g in _gradients(value, roles.trained["fake"].values()))
    with_it, without = (
        next(iter(matching_losses(method, roles, train_batch(method, roles))))
        for method in (DistributionMatching(fake=FakeScoreConfig(consistency=w)) for w in (0.5, 0.0))
    )
    assert torch.equal(with_it.metrics["fake_loss"], without.metrics["fake_loss"])
    assert float(with_it.value) != float(without.value)


@pytest.mark.parametrize("name", RATIO_WEIGHTS)
def test_ratio_weights_are_the_second_derivative_of_their_f(name: str) -> None:
    """`h(r) = f''(r) r^2`, by finite differences."""
    f = {
        "kl": lambda r: r * r.log(),
        "jeffreys": lambda r: (r - 1) * r.log(),
        "hellinger": lambda r: (1 - r.sqrt()).square(),
        "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "softened-reverse-kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    }[name]
    r, step = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), 1e-4
    second = (f(r + step) - 2 * f(r) + f(r - step)) / step**2
    torch.testing.assert_close(RATIO_WEIGHTS[name](r), second * r**2, rtol=1e-5, atol=1e-6)


def test_an_f_divergence_weighs_samples_by_what_the_discriminator_knows() -> None:
    """Of a Gaussian target and student, the weighted pull is the gradient of their KL."""
    logits = torch.tensor([[1.0, 3.0], [-9.0, -9.0], [0.0, 0.0]])
    r = torch.tensor([2.0, -9.0, 0.0]).exp().clamp(0.1, 10)
    torch.testing.assert_close(ratio_weight(RATIO_WEIGHTS["js"], logits), (r / (1 + r)) / (r / (1 + r)).mean())
    roles, gan = adversaries(), GanConfig(weight=0.5, loss="non-saturating")
    found = {}
    for name in ("reverse-kl", "kl"):
        method = DistributionMatching(gan=gan, match=MatchConfig(divergence=name))
        *_, loss = matching_losses(method, roles, train_batch(method, roles, images=real_data(roles)))
        found[name] = loss
    assert torch.equal(found["kl"].metrics["student_loss"], found["reverse-kl"].metrics["student_loss"])
    assert float(found["kl"].value) != float(found["reverse-kl"].value)
    assert DIVERGENCES["kl"].loss is DIVERGENCES["reverse-kl"].loss
    for lacking in (GanConfig(), GanConfig(weight=1.0)):
        with pytest.raises(ValueError, match=r"divergence: got js, .*gan\.weight .*non-saturating"):
            DistributionMatching(match=MatchConfig(divergence="js"), gan=lacking)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_learns_where_the_teacher_lands(schedule: Schedule) -> None:
    """For flow: `mean ||v - (eps - z)/(1 - t)||^2` with the teacher's state z at the landing time t."""
    roles = trained(backbone=tiny.denoiser(schedule=schedule))
    cond, null = conditions(roles.backbone)
    method = DistributionMatching(
        steps=2, guidance=Guidance(scale=3.0), first_step=FirstStepConfig(weight=0.05, teacher_steps=3)
    )
    d = draw(method, roles, cond, BATCH, seed(), with_gradient=True)
    first, losses = first_step_loss(method, roles, d, null)
    assert first.tolist() == (d.segment == 0).tolist() and 0 < int(first.sum()) < BATCH
    assert not losses[~first].any()
    times = timegrid.between(schedule, d.times[0], d.times[1], 3)
    assert len(times) == 4
    with torch.no_grad():
        teacher = roles.teacher({k: v[first] for k, v in cond.items()}, null, Guidance(scale=3.0))
        assert d.begun is not None
        *_, last = sample(teacher, schedule, d.begun[first], times, SOLVERS["ddim"])
    s, t = d.times[:2]
    ratio = schedule.sigma(t[None]) / schedule.sigma(s[None])
    scale = schedule.alpha(t[None]) - ratio * schedule.alpha(s[None])
    goal = (last.x - ratio.float() * d.begun[first]) / scale.float()
    torch.testing.assert_close(losses[first], 0.05 * (d.x0[first] - goal).square().flatten(1).mean(1))
    if isinstance(schedule, Flow):
        v, eps = d.begun[first] - d.x0[first], d.begun[first]
        same = 0.05 * (v - (eps - last.x) / (1 - float(t))).square().flatten(1).mean(1)
        torch.testing.assert_close(losses[first], same, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_regressed_and_not_matched() -> None:
    roles = trained()
    method = DistributionMatching(steps=2, first_step=FirstStepConfig(weight=0.05))
    *_, loss = matching_losses(method, roles, train_batch(method, roles))
    d = draw(method, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
    null = conditions(roles.backbone)[1]
    first, regressed = first_step_loss(method, roles, d, null)
    with torch.no_grad():
        f_fake = roles.denoise("fake", d.cond)(d.x_tau, d.tau).x0
        f_teacher = roles.teacher(d.cond, null, method.guidance)(d.x_tau, d.tau).x0
    each = student_loss(method, tiny.TABLE, d, f_fake, f_teacher)
    torch.testing.assert_close(loss.value, torch.where(first, regressed, each).mean())
    assert set(method.metrics) >= {"first_step_loss"} <= set(loss.metrics)
    assert method.one_step().first_step.weight == 0
    with pytest.raises(ValueError, match=r"first_step\.weight: got 0\.05 with steps=1"):
        DistributionMatching(steps=1, first_step=FirstStepConfig(weight=0.05))
    with pytest.raises(ValueError, match=r"first_step\.weight: got 0\.05 with analytic_first_step"):
        DistributionMatching(analytic_first_step=True, first_step=FirstStepConfig(weight=0.05))


def test_a_stretch_of_a_table_has_no_more_times_than_the_table() -> None:
    start, end = torch.tensor(10.0).double(), torch.tensor(7.0).double()
    assert timegrid.between(tiny.TABLE, start, end, 8).tolist() == [10, 9, 8, 7]
    assert isinstance(tiny.TABLE, VP)
