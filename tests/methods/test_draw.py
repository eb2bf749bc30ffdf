"""Where x_tau is drawn: the rollout, the segment, the time inside it."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, Cond
from fewstep.core.schedule import EDM, expand, transition
from fewstep.core.solvers import Denoise, sample, solver_named
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    NoisedSample,
    draw,
    matching_losses,
)
from fewstep.methods.matching_settings import MatchConfig
from fewstep.methods.method import draw_count, student_of
from fewstep.roles.roles import Role, Roles, RolesConfig, make_roles

from .. import tiny
from .common import BATCH, conditions, seed, train_batch, trained


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_landing_state_is_the_samplers_own(steps: int, solver: str) -> None:
    """Rollout and step give the state that `sample` of the student gives.

    This holds for every solver and under each sample's own condition.
    """
    roles, method = trained(), DistributionMatching(steps=steps, solver=solver)
    cond, _ = conditions(roles.backbone)
    got = draw(method, roles, cond, BATCH, seed(), with_gradient=True)
    noise = torch.randn((BATCH, *roles.backbone.shape), generator=seed())
    with torch.no_grad():
        walk = sample(roles.denoise("student", cond), tiny.TABLE, noise, method.times(tiny.TABLE), solver_named(solver))
        states = list(walk)
    for i, k in enumerate(got.segment.tolist()):
        clean = states[k + 1].x0
        assert clean is not None
        torch.testing.assert_close(got.x_m[i], states[k + 1].x[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.x0[i], clean[i], rtol=1e-4, atol=1e-4)
    assert sorted(set(got.segment.tolist())) == list(range(steps))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_a_free_first_step_is_walked_without_the_network_and_not_trained(solver: str) -> None:
    roles, method, calls = (
        trained(),
        DistributionMatching(steps=4, solver=solver, analytic_first_step=True),
        list[int](),
    )
    cond, _ = conditions(roles.backbone)
    roles.backbone.module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    got = draw(method, roles, cond, BATCH, seed(), with_gradient=True)
    assert sorted(set(got.segment.tolist())) == [1, 2, 3]
    assert len(calls) == 3
    assert bool((got.tau <= 749).all())
    noise = torch.randn((BATCH, *roles.backbone.shape), generator=seed())
    with torch.no_grad():
        walk = sample(
            student_of(method, roles, cond), tiny.TABLE, noise, method.times(tiny.TABLE), solver_named(solver)
        )
        states = list(walk)
    assert len(calls) == 6
    for i, k in enumerate(got.segment.tolist()):
        torch.testing.assert_close(got.x_m[i], states[k + 1].x[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"steps": (4, 1)}, "analytic_first_step: got True for a student of 1 step"),
    ({"solver": "renoise"}, "analytic_first_step: got True with solver=renoise"),
])  # fmt: skip
def test_a_free_first_step_is_neither_the_only_one_nor_at_random(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DistributionMatching(analytic_first_step=True, **settings)


@pytest.mark.parametrize("backbone", [tiny.denoiser(), tiny.flow_denoiser()], ids=["table", "flow"])
@pytest.mark.parametrize(("steps", "tau_min"), [(4, 0.02), (4, 0.0), (1, 0.1), (2, 0.6)])
def test_tau_is_drawn_in_the_segment_and_away_from_clean_data(backbone: Backbone, steps: int, tau_min: float) -> None:
    roles, method, schedule = (
        make_roles(backbone, RolesConfig(rank=2)),
        DistributionMatching(steps=steps, match=MatchConfig(tau_min=tau_min)),
        backbone.schedule,
    )
    cond, _ = conditions(backbone, 64)
    times = method.times(schedule)
    least = schedule.t_clean + tau_min * (schedule.t_max - schedule.t_clean)
    for i in range(5):
        d = draw(method, roles, cond, 64, seed(i), with_gradient=False)
        high = times[d.segment]
        assert torch.equal(d.t, times[d.segment + 1])
        assert bool(((d.tau > d.t) & (d.tau <= high)).all())
        assert bool(((d.tau >= least) | (d.tau == high)).all())
        assert bool(torch.isfinite(d.x_tau).all())
        if schedule.resolution:
            assert torch.equal(d.tau, d.tau.round())


def test_x_tau_is_the_transition_of_the_landing_state() -> None:
    roles, method = trained(), DistributionMatching()
    d = draw(method, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
    r, beta = transition(tiny.TABLE, d.t, d.tau)
    torch.testing.assert_close(d.x_tau, expand(r, d.x_m) * d.x_m + expand(beta, d.e) * d.e)
    assert d.x_m.requires_grad
    assert d.x0.requires_grad
    assert d.x_m.dtype == d.x_tau.dtype == torch.float32


def test_a_draw_depends_on_its_generator_alone() -> None:
    roles, method = trained(), DistributionMatching()
    cond, _ = conditions(roles.backbone)
    torch.manual_seed(1)
    first = draw(method, roles, cond, BATCH, seed(), with_gradient=False)
    torch.manual_seed(2)
    again, other = (draw(method, roles, cond, BATCH, seed(i), with_gradient=False) for i in (0, 1))
    assert torch.equal(first.x_tau, again.x_tau)
    assert not torch.equal(first.x_tau, other.x_tau)
    assert not first.x_m.requires_grad


def test_the_rollout_starts_at_the_schedules_noise() -> None:
    roles = make_roles(tiny.denoiser(schedule=EDM(t_max=5.0), prediction="x0"), RolesConfig(lora=False))
    seen: list[Tensor] = []
    roles.networks["student"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    draw(DistributionMatching(steps=1), roles, conditions(roles.backbone, 256)[0], 256, seed(), with_gradient=False)
    assert seen[0].std().item() == pytest.approx(5, rel=0.02)


# What is matched, and where


def clean_draws(tau_range: Literal["segment", "to_noise", "full"], steps: int = 4) -> tuple[Roles, NoisedSample]:
    roles = trained()
    match = MatchConfig(state="clean", tau_range=tau_range, tau_min=0.1, tau_max=0.9)
    method = DistributionMatching(steps=steps, match=match)
    return roles, draw(method, roles, conditions(roles.backbone, 64)[0], 64, seed(), with_gradient=True)


def test_matching_clean_samples_diffuses_the_clean_estimate() -> None:
    _, d = clean_draws("segment")
    assert d.x_m is d.x0
    assert bool((d.t == tiny.TABLE.t_clean).all())
    alpha, sigma = expand(tiny.TABLE.alpha(d.tau), d.x0), expand(tiny.TABLE.sigma(d.tau), d.x0)
    torch.testing.assert_close(d.x_tau, alpha * d.x0 + sigma * d.e)


def test_tau_over_its_segment_over_what_is_noisier_and_over_all_times() -> None:
    times = DistributionMatching().times(tiny.TABLE)
    least, most = 99, 899  # a tenth of 1000 from either end, counted from clean data at -1
    found = {tau: clean_draws(tau)[1] for tau in ("segment", "to_noise", "full")}
    landing = {tau: times[d.segment + 1] for tau, d in found.items()}
    segment, above, whole = (found[tau] for tau in ("segment", "to_noise", "full"))
    assert bool(((segment.tau > landing["segment"]) & (segment.tau <= times[segment.segment])).all())
    assert bool((above.tau > landing["to_noise"]).all())
    assert bool((above.tau > times[above.segment]).any())
    assert bool((whole.tau <= landing["full"]).any())
    for d in found.values():
        assert bool(((d.tau > least) & (d.tau <= most)).all())
    last = whole.tau[whole.segment == 3]
    assert last.min() < 350
    assert last.max() > 650


def test_a_noisy_state_is_diffused_to_all_noisier_times() -> None:
    roles, method = trained(), DistributionMatching(match=MatchConfig(tau_range="to_noise"))
    d = draw(method, roles, conditions(roles.backbone, 64)[0], 64, seed(), with_gradient=False)
    assert bool((d.tau > d.t).all())
    assert d.tau[d.segment == 3].max() > 500
    r, beta = transition(tiny.TABLE, d.t, d.tau)
    torch.testing.assert_close(d.x_tau, expand(r, d.x_m) * d.x_m + expand(beta, d.e) * d.e)


@pytest.mark.parametrize("analytic_first_step", [False, True])
def test_sharded_processes_make_the_same_calls_whatever_they_draw(
    analytic_first_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is spread works when all call it: one call short in one process and the others wait for ever."""
    monkeypatch.setattr(Roles, "sharded", True)
    roles, method, calls = (
        trained(),
        DistributionMatching(steps=4, analytic_first_step=analytic_first_step),
        list[int](),
    )
    cond, _ = conditions(roles.backbone, 1)
    roles.backbone.module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    made = set()
    for i in range(16):
        calls.clear()
        segment = int(draw(method, roles, cond, 1, seed(i), with_gradient=True).segment)
        made.add((segment, len(calls)))
    assert {segment for segment, _ in made} == set(range(int(analytic_first_step), 4))
    assert {count for _, count in made} == {4 - int(analytic_first_step)}


def test_stochastic_rollouts_add_fresh_noise_after_every_step() -> None:
    """A stochastic rollout's state at time t is alpha + sigma e.

    The student always says 1, so the spread is sigma_t's and nothing is left of the start.
    """
    backbone = tiny.denoiser(prediction="x0")
    roles = make_roles(backbone, RolesConfig(lora=False))
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.zero_()
    seen: list[Tensor] = []
    roles.networks["student"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    d = draw(
        DistributionMatching(solver="renoise"), roles, conditions(backbone, 400)[0], 400, seed(), with_gradient=True
    )
    start = torch.randn((400, *backbone.shape), generator=seed())
    for k in range(1, 4):
        sigma = float(tiny.TABLE.sigma(torch.tensor(999.0 - 250 * k)))
        x = seen[-1][d.segment == k]
        assert x.std().item() == pytest.approx(sigma, rel=0.05)
        assert abs(float((x * start[d.segment == k]).mean())) < 0.1 * sigma
    assert d.x_m.requires_grad


def test_the_step_count_is_drawn_evenly_once_an_iteration_and_told() -> None:
    method = DistributionMatching(steps=(4, 2, 1))
    roles = make_roles(tiny.denoiser(), RolesConfig(rank=2), condition_values=method.condition_values)
    cond, _ = conditions(roles.backbone)
    counts = [draw(method, roles, cond, BATCH, seed(i), with_gradient=False).steps for i in range(150)]
    assert min(counts.count(k) for k in (4, 2, 1)) > 30
    told: list[tuple[str, float | None]] = []
    denoise = roles.denoise
    for i in range(6):
        told.clear()
        recording = Recording(denoise, told)
        object.__setattr__(roles, "denoise", recording)
        *_, last = matching_losses(method, roles, train_batch(method, roles, rng=seed(i)))
        object.__delattr__(roles, "denoise")
        (steps,) = {k for _, k in told}
        assert steps == counts[i]
        assert {r for r, _ in told} == {"student", "fake"}
        assert {k for k in last.metrics if k.startswith("gap_")} == {f"gap_{counts[i]}_{k}" for k in range(counts[i])}


def test_a_step_count_that_is_named_more_often_is_drawn_more_often_and_is_one_count() -> None:
    method = DistributionMatching(steps=(4, 1, 1, 1))
    assert method.counts == method.condition_values == (4, 1)
    drawn = [draw_count(method.steps, seed(i)) for i in range(400)]
    assert 250 < drawn.count(1) < 350 and drawn.count(4) == 400 - drawn.count(1)
    assert {draw_count(3, seed(0)), draw_count((2, 2), seed(0))} == {3, 2} and DistributionMatching(
        steps=(2, 2)
    ).condition_values == ()


class Recording:
    """`roles.denoise` that notes whom it was asked for."""

    def __init__(self, inner: Callable[..., Denoise], told: list[tuple[str, float | None]]) -> None:
        self.inner, self.told = inner, told

    def __call__(self, role: Role, cond: Cond, told: float | None = None, step: Tensor | None = None) -> Denoise:
        self.told.append((role, told))
        return self.inner(role, cond, told, step)
