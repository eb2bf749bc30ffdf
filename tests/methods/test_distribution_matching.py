"""One iteration: what each update's loss is, whom it trains, and what it costs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.prediction import row_named
from fewstep.core.schedule import expand
from fewstep.core.weighting import own_output, truncated_v
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    NoisedSample,
    draw,
    fake_loss,
    student_loss,
)
from fewstep.methods.matching_settings import FakeScoreConfig, GanConfig, MatchConfig
from fewstep.objectives.denoising import transition_target
from fewstep.objectives.reverse_kl import SURROGATE_LOSSES
from fewstep.roles.roles import Role, RolesConfig, make_roles

from .. import tiny
from .common import BATCH, conditions, gradients, seed, trained, updates

V = row_named("v")


def made_up_draw() -> tuple[NoisedSample, Tensor, Tensor]:
    roles, method = trained(), DistributionMatching()
    d = draw(method, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
    f_fake, f_teacher = torch.randn((2, *d.x_m.shape), generator=seed(7))
    return d, f_fake, f_teacher


def test_fake_loss_on_the_clean_estimate() -> None:
    d, f_fake, _ = made_up_draw()
    per_sample = (f_fake - d.x0.detach()).square().flatten(1).mean(1)
    expected = (own_output(tiny.TABLE, V, d.tau, 5.0).float() * per_sample).mean()
    torch.testing.assert_close(fake_loss(DistributionMatching(), tiny.TABLE, V, d, f_fake), expected)
    assert not fake_loss(DistributionMatching(), tiny.TABLE, V, d, f_fake).requires_grad  # nothing reaches the student


def test_fake_loss_on_the_transition_noise() -> None:
    d, f_fake, _ = made_up_draw()
    goal, weight = transition_target(tiny.TABLE, d.x_m.detach(), d.e, d.t, d.tau)
    per_sample = (f_fake - goal).square().flatten(1).mean(1)
    expected = ((weight * own_output(tiny.TABLE, V, d.tau, 2.0)).float() * per_sample).mean()
    torch.testing.assert_close(
        fake_loss(
            DistributionMatching(fake=FakeScoreConfig(target="transition", snr_clip=2.0)), tiny.TABLE, V, d, f_fake
        ),
        expected,
    )


def test_without_the_importance_draw_the_fake_score_learns_around_the_clean_estimate() -> None:
    """Its x_tau is diffused from x0_hat and its target is x0_hat; the student's gradient is taken where it was."""
    method = DistributionMatching(fake=FakeScoreConfig(input="clean"), match=MatchConfig(tau_min=0.0))
    inputs: list[Tensor] = []
    copies = trained(share=False)
    copies.networks["fake"].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    first, last = updates(copies, method)
    d = draw(method, copies, conditions(copies.backbone)[0], BATCH, seed(), with_gradient=False)
    alpha, sigma = expand(tiny.TABLE.alpha(d.tau), d.x0), expand(tiny.TABLE.sigma(d.tau), d.x0)
    torch.testing.assert_close(inputs[0], alpha * d.x0 + sigma * d.e)
    torch.testing.assert_close(inputs[1], d.x_tau)
    assert [first.role, last.role] == ["fake", "student"]


def test_fisher_loss_is_its_formula() -> None:
    d, f_fake, f_teacher = made_up_draw()
    goal, weight = transition_target(tiny.TABLE, d.x_m, d.e, d.t, d.tau)
    delta, n = f_teacher - f_fake, (d.x0 - f_teacher).abs().flatten(1).mean(1)
    expected = (delta * (f_teacher - goal)).flatten(1).sum(1) - 0.7 * delta.square().flatten(1).sum(1)
    method = DistributionMatching(match=MatchConfig(divergence="fisher", fisher_correction=0.7))
    found = student_loss(method, tiny.TABLE, d, f_fake, f_teacher).mean()
    torch.testing.assert_close(found, (weight.float() * expected / n).mean())


def test_fisher_goes_through_the_scores_inputs() -> None:
    """Unlike reverse KL: the gradient is not that of fixed scores."""
    roles, method = trained(), DistributionMatching(match=MatchConfig(divergence="fisher"))
    *_, loss = updates(roles, method)
    d = draw(DistributionMatching(), roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
    cond, null = conditions(roles.backbone)
    with torch.no_grad():
        fixed = (
            roles.denoise("fake", cond)(d.x_tau, d.tau).x0,
            roles.teacher(cond, null, Guidance(scale=3.5))(d.x_tau, d.tau).x0,
        )
    still = student_loss(method, tiny.TABLE, d, *fixed).mean()
    torch.testing.assert_close(loss.value, still, rtol=1e-4, atol=1e-4)  # the same value, another gradient
    through, around = gradients(loss.value, roles, "student"), gradients(still, roles, "student")
    assert any(
        not torch.allclose(a, b, rtol=0.05)
        for a, b in zip(through, around, strict=True)
        if a is not None and b is not None
    )


def test_the_fake_scores_errors_are_weighed_by_what_the_network_predicts() -> None:
    d, f_fake, _ = made_up_draw()
    eps = row_named("eps")
    per_sample = (f_fake - d.x0.detach()).square().flatten(1).mean(1)
    expected = ((tiny.TABLE.alpha(d.tau) / tiny.TABLE.sigma(d.tau)).square().clamp(max=5).float() * per_sample).mean()
    torch.testing.assert_close(fake_loss(DistributionMatching(), tiny.TABLE, eps, d, f_fake), expected)
    backbone = tiny.denoiser(prediction="eps")
    own, v = (DistributionMatching(fake=FakeScoreConfig(weight=w, share_noised_sample=False)) for w in ("own", "v"))
    loss = next(iter(updates(trained(backbone=backbone), own)))
    other = next(iter(updates(trained(backbone=backbone), v)))
    assert float(loss.value) < float(other.value)


def test_fake_loss_weighted_like_v() -> None:
    d, f_fake, _ = made_up_draw()
    per_sample = (f_fake - d.x0.detach()).square().flatten(1).mean(1)
    expected = (truncated_v(tiny.TABLE, V, d.tau, 3.0).float() * per_sample).mean()
    torch.testing.assert_close(
        fake_loss(DistributionMatching(fake=FakeScoreConfig(weight="v", snr_clip=3.0)), tiny.TABLE, V, d, f_fake),
        expected,
    )


@pytest.mark.parametrize("loss", SURROGATE_LOSSES)
def test_student_loss_pulls_the_landing_state_against_the_difference(loss: str) -> None:
    d, f_fake, f_teacher = made_up_draw()
    value = student_loss(DistributionMatching(loss=loss), tiny.TABLE, d, f_fake, f_teacher).mean()
    (got,) = torch.autograd.grad(value, d.x_m, retain_graph=True)
    delta, n = f_fake - f_teacher, expand((d.x0.detach() - f_teacher).abs().flatten(1).mean(1), f_fake)
    size = delta.numel() / BATCH
    expected = {
        "l2": delta / n,
        "huber": delta / (delta.square().sum((1, 2, 3), keepdim=True) + 0.00054**2 * size).sqrt(),
        "huber-elementwise": delta / n / ((delta / n).square() + 1e-6).sqrt(),
    }[loss]
    torch.testing.assert_close(got, expected / BATCH, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", SURROGATE_LOSSES)
@pytest.mark.parametrize(
    "backbone", [tiny.denoiser, tiny.flow_denoiser, tiny.stable_diffusion], ids=["table", "flow", "sd"]
)
def test_equal_roles_without_guidance_have_no_gradient_at_all(backbone: type, loss: str) -> None:
    """Fake score = teacher, bit for bit: the matching gradient is exactly zero, not a small number."""
    roles = make_roles(backbone(), RolesConfig(rank=2))
    for item in updates(roles, DistributionMatching(loss=loss, guidance=Guidance(scale=1.0)), batch=4):
        if item.role == "student":
            assert item.value.item() == 0
            assert all(g is None or not bool(g.any()) for g in gradients(item.value, roles, "student"))
            assert all(v == 0 for k, v in item.metrics.items() if k.startswith("gap_"))
            return
    pytest.fail("there was no student update")


def test_guidance_makes_a_gradient_from_the_first_iteration() -> None:
    roles = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    *_, last = updates(roles, DistributionMatching(guidance=Guidance(scale=3.5)))
    assert any(g is not None and bool(g.any()) for g in gradients(last.value, roles, "student"))


# Whom they train, in which order


@pytest.mark.parametrize(
    ("share_noised_sample", "fake_updates", "warming_up", "expected"),
    [
        (True, 1, False, ["fake", "student"]),
        (False, 1, False, ["fake", "student"]),
        (True, 3, False, ["fake", "fake", "fake", "student"]),
        (False, 3, False, ["fake", "fake", "fake", "student"]),
        (True, 1, True, ["fake"]),
        (False, 3, True, ["fake", "fake", "fake"]),
    ],
)
def test_order_of_updates(share_noised_sample: bool, fake_updates: int, warming_up: bool, expected: list[str]) -> None:
    method = DistributionMatching(fake=FakeScoreConfig(share_noised_sample=share_noised_sample, updates=fake_updates))
    assert [loss.role for loss in updates(trained(), method, warming_up)] == expected


@pytest.mark.parametrize("share_noised_sample", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_each_loss_trains_its_own_role_and_no_other(share: bool, share_noised_sample: bool) -> None:
    roles = trained(share)
    for loss in updates(roles, DistributionMatching(fake=FakeScoreConfig(share_noised_sample=share_noised_sample))):
        other: Role = "student" if loss.role == "fake" else "fake"
        if loss.role == "student":
            assert all(g is None for g in gradients(loss.value, roles, other))
        else:
            assert not any(g is not None for g in gradients(loss.value, roles, other))
        assert all(g is not None and bool(g.any()) for g in gradients(loss.value, roles, loss.role))


@pytest.mark.parametrize("share", [True, False])
def test_the_fake_step_in_between_leaves_the_students_gradient_exact(share: bool) -> None:
    """With a shared draw the caller changes the fake score while the student's graph waits."""
    found = []
    for step in (0.0, 10.0):
        roles = trained(share)
        for loss in updates(roles, DistributionMatching()):
            if loss.role == "fake":
                with torch.no_grad():
                    for p, g in zip(roles.trained["fake"].values(), gradients(loss.value, roles, "fake"), strict=True):
                        assert g is not None
                        p.sub_(step * g)
            else:
                found.append(gradients(loss.value, roles, "student"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(
    "method",
    [
        DistributionMatching(),
        DistributionMatching(loss="l2", fake=FakeScoreConfig(target="transition")),
        DistributionMatching(fake=FakeScoreConfig(share_noised_sample=False, updates=2)),
    ],
)
def test_shared_and_copied_roles_have_the_same_first_iteration(method: DistributionMatching) -> None:
    values = []
    for share in (True, False):
        roles = make_roles(tiny.denoiser(), RolesConfig(lora=share, rank=2))
        values.append([(loss.role, {k: v.item() for k, v in loss.metrics.items()}) for loss in updates(roles, method)])
    for (role, mine), (other, theirs) in zip(*values, strict=True):
        assert role == other
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)


# What it costs: method.md's count, in rows of the batch


@contextmanager
def batch_sizes(modules: Sequence[nn.Module]) -> Iterator[list[list[int]]]:
    seen: list[list[int]] = [[] for _ in modules]
    handles = [
        m.register_forward_pre_hook(lambda _, args, s=s: s.append(len(args[0])))
        for m, s in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


ROLLOUT = [6, 4, 2]  # 8 samples, 2 a segment: those that go further than the first, second and third time


@pytest.mark.parametrize(
    ("method", "warming_up", "student", "teacher", "fake"),
    [
        (DistributionMatching(), False, [*ROLLOUT, 8], [16], [8]),
        (DistributionMatching(guidance=Guidance(scale=1.0)), False, [*ROLLOUT, 8], [8], [8]),
        (DistributionMatching(fake=FakeScoreConfig(share_noised_sample=False)), False, [*ROLLOUT, 8] * 2, [16], [8, 8]),
        (DistributionMatching(fake=FakeScoreConfig(updates=3)), False, [*ROLLOUT, 8] * 3, [16], [8] * 3),
        (
            DistributionMatching(fake=FakeScoreConfig(updates=3, share_noised_sample=False)),
            False,
            [*ROLLOUT, 8] * 4,
            [16],
            [8] * 4,
        ),
        (DistributionMatching(), True, [*ROLLOUT, 8], [], [8]),
        (DistributionMatching(fake=FakeScoreConfig(updates=2)), True, [*ROLLOUT, 8] * 2, [], [8, 8]),
        (DistributionMatching(match=MatchConfig(divergence="fisher")), False, [*ROLLOUT, 8], [16], [8, 8]),
        (DistributionMatching(fake=FakeScoreConfig(input="clean")), False, [*ROLLOUT, 8], [16], [8, 8]),
        (
            DistributionMatching(solver="renoise", match=MatchConfig(state="clean", tau_range="full")),
            False,
            [*ROLLOUT, 8],
            [16],
            [8],
        ),
        (DistributionMatching(steps=1), False, [8], [16], [8]),
        (DistributionMatching(steps=2), False, [4, 8], [16], [8]),
    ],
)
def test_network_calls_of_an_iteration(
    method: DistributionMatching, warming_up: bool, student: list[int], teacher: list[int], fake: list[int]
) -> None:
    copies = make_roles(tiny.denoiser(), RolesConfig(lora=False))
    with batch_sizes([copies.networks[r] for r in ("student", "teacher", "fake")]) as seen:
        list(updates(copies, method, warming_up))
    assert seen == [student, teacher, fake]
    shared = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    with batch_sizes([shared.backbone.module]) as (every,):
        list(updates(shared, method, warming_up))
    assert sorted(every) == sorted(student + teacher + fake)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_forward_passes_per_sample(steps: int) -> None:
    """(K + 1)/2 for the student, 2 for the guided teacher, 1 for the fake score, which serves both updates."""
    roles = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    with batch_sizes([roles.backbone.module]) as (seen,):
        list(updates(roles, DistributionMatching(steps=steps)))
    assert sum(seen) / BATCH == (steps + 1) / 2 + 2 + 1


def test_gap_of_every_segment_is_logged() -> None:
    *_, last = updates(trained(), DistributionMatching())
    assert set(last.metrics) == {"student_loss", "gap_0", "gap_1", "gap_2", "gap_3"}
    *_, small = updates(trained(), DistributionMatching(), batch=2)
    assert len(small.metrics) == 3


# Settings


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (DistributionMatching, {"steps": 0}, "steps: got 0, allowed are whole numbers from 1"),
        (
            DistributionMatching,
            {"steps": ()},
            "steps: got (), allowed are whole numbers from 1 to 1000, or a list of them",
        ),
        (DistributionMatching, {"steps": (4, 0)}, "steps: got (4, 0), allowed are"),
        (DistributionMatching, {"steps": 2**31}, "steps: got 2147483648, allowed are whole numbers from 1 to 1000"),
        (DistributionMatching, {"guidance": float("nan")}, "guidance.scale: got nan, allowed are numbers"),
        (DistributionMatching, {"guidance": 1e30}, "guidance.scale: got 1e+30, allowed are numbers from -1000 to 1000"),
        (DistributionMatching, {"loss": "l1"}, "loss: got 'l1', allowed are l2, huber, huber-elementwise"),
        (DistributionMatching, {"warmup": -1}, "warmup: got -1, allowed are whole numbers from 0"),
        (DistributionMatching, {"solver": "heun"}, "solver: got 'heun', allowed are ddim, dpmpp, ipndm, renoise"),
        (DistributionMatching, {"shift": 0.0}, "shift: got 0.0, allowed are numbers above 0"),
        (
            MatchConfig,
            {"divergence": "x"},
            "match.divergence: got 'x', allowed are reverse-kl, fisher, kl, jeffreys, hellinger, js",
        ),
        (MatchConfig, {"state": "landing"}, "match.state: got 'landing', allowed are noisy, clean"),
        (MatchConfig, {"tau_range": "all"}, "match.tau_range: got 'all', allowed are segment, to_noise, full"),
        (MatchConfig, {"tau_range": "full"}, "match.tau_range: got full, which needs match.state=clean"),
        (MatchConfig, {"tau_min": 1.0}, "match.tau_min: got 1.0, allowed are numbers from 0 up to, not including, 1"),
        (
            MatchConfig,
            {"tau_max": 0.01},
            "match.tau_max: got 0.01, allowed are fractions above match.tau_min (0.02) up to 1",
        ),
        (FakeScoreConfig, {"input": "noise"}, "fake.input: got 'noise', allowed are noisy, clean"),
        (FakeScoreConfig, {"target": "noisy"}, "fake.target: got 'noisy', allowed are clean, transition"),
        (FakeScoreConfig, {"weight": "snr"}, "fake.weight: got 'snr', allowed are own, min-snr, v"),
        (FakeScoreConfig, {"updates": 0}, "fake.updates: got 0, allowed are whole numbers from 1"),
        (FakeScoreConfig, {"updates": 2**31}, "fake.updates: got 2147483648, allowed are whole numbers from 1 to 1000"),
        (FakeScoreConfig, {"snr_clip": 0.0}, "fake.snr_clip: got 0.0, allowed are numbers above 0"),
        (GanConfig, {"weight": -1.0}, "gan.weight: got -1.0, allowed are numbers from 0 (0: off)"),
        (GanConfig, {"r1": float("nan")}, "gan.r1: got nan, allowed are numbers from 0 (0: off)"),
        (GanConfig, {"loss": "w"}, "gan.loss: got 'w', allowed are hinge, non-saturating"),
    ],
)
def test_settings_that_cannot_be(kind: type, settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        kind(**settings)
    assert str(error.value).startswith(expected)


def test_times_are_the_uniform_grid_of_any_step_count() -> None:
    method = DistributionMatching(steps=4, shift=2.0)
    assert torch.equal(method.times(tiny.TABLE), timegrid.uniform(tiny.TABLE, 4, 2.0))
    assert torch.equal(method.times(tiny.TABLE, 2), timegrid.uniform(tiny.TABLE, 2, 2.0))
    several = DistributionMatching(steps=(2, 4))
    assert torch.equal(several.times(tiny.TABLE), timegrid.uniform(tiny.TABLE, 2))
    assert (several.counts, several.condition_values) == ((2, 4), (2, 4))
    assert (
        DistributionMatching(steps=(2, 4), condition=False).condition_values
        == DistributionMatching(steps=(2,)).condition_values
        == DistributionMatching(steps=4).condition_values
        == ()
    )


def test_tilted_guidance_is_stronger_near_noise_and_as_strong_in_the_middle() -> None:
    method = DistributionMatching(guidance=Guidance(scale=4.0, tilt=0.5))
    tau = torch.tensor([999.0, 499.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        method.guidance.scale_at(tiny.TABLE, tau), torch.tensor([6.0, 4.0, 2.0], dtype=torch.float64)
    )
    assert Guidance(scale=4.0).scale_at(tiny.TABLE, tau) == 4.0
    with pytest.raises(ValueError, match=r"^guidance\.tilt: got 2, allowed are numbers from -1 to 1"):
        DistributionMatching(guidance=Guidance(tilt=2))


def test_the_teacher_is_asked_without_the_parallel_part() -> None:
    """The same draws and networks: what is taken away from the teacher's belief is along its clean estimate."""
    roles = trained()
    plain, projected = (
        list(updates(roles, DistributionMatching(steps=2, guidance=Guidance(scale=3.0, apg_eta=p))))[-1].metrics[
            "gap_1"
        ]
        for p in (1.0, 0.0)
    )
    assert not torch.allclose(plain, projected)
    with pytest.raises(ValueError, match=r"^guidance\.apg_eta: got 1.5, allowed are numbers from 0 to 1"):
        DistributionMatching(guidance=Guidance(apg_eta=1.5))


def test_the_teacher_is_asked_with_it() -> None:
    """The same guidance on average, another one at each tau: another loss."""
    roles = trained()
    plain, tilted = (
        list(updates(roles, DistributionMatching(steps=2, guidance=Guidance(scale=g, tilt=b))))[-1].value
        for g, b in ((3.0, 0.0), (3.0, 0.4))
    )
    assert not torch.allclose(plain, tilted)
