"""Settings that rivals ship: each equals its closed form, and is off by default."""

import pytest
import torch
from torch import Tensor

from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import EDM
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    FakeScoreConfig,
    MatchConfig,
    draw,
    guidance_loss,
    student_loss,
)
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.student.student import Origin, student_card
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.settings import require_unchanged, settings_of

from .. import tiny
from .common import BATCH, conditions, seed, trained


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
        value = student_loss(method, roles.backbone.schedule, d._replace(x_m=x), f_fake, f_teacher)
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
