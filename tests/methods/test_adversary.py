"""The adversarial term: a role of its own, against real data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import EMBEDDED, Backbone, Cond
from fewstep.core.schedule import expand
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    adversarial_loss,
    discriminator_loss,
    draw,
    matching_losses,
    student_logits,
)
from fewstep.methods.matching_settings import FakeScoreConfig, GanConfig
from fewstep.methods.method import RealBatch
from fewstep.objectives.adversarial import GAN_LOSSES
from fewstep.roles.discriminator import Discriminator, features
from fewstep.roles.roles import TRAINED, Roles, RolesConfig, make_roles

from .. import tiny
from .common import BATCH, conditions, gradients, seed, train_batch

TRAINED_BY: tuple[Literal["teacher", "fake"], ...] = ("teacher", "fake")


def adversaries(share: bool = True) -> Roles:
    backbone = replace(tiny.denoiser(), feature_layers=("inp", "to_q"))
    roles = make_roles(backbone, RolesConfig(lora=share, rank=2), gan_step_counts=(4,))
    with torch.no_grad():
        for role in TRAINED:
            for p in roles.trained[role].values():
                p.add_(0.1 * torch.randn(p.shape, generator=seed(3)))
    return roles


def real_data(roles: Roles) -> RealBatch:
    return RealBatch(torch.randn((BATCH, *roles.backbone.shape), generator=seed(9)), conditions(roles.backbone)[0])


@pytest.mark.parametrize("share_noised_sample", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_the_adversarial_term_has_a_role_of_its_own(share: bool, share_noised_sample: bool) -> None:
    roles = adversaries(share)
    method = DistributionMatching(
        gan=GanConfig(weight=0.5, r1=0.1), fake=FakeScoreConfig(share_noised_sample=share_noised_sample)
    )
    found = []
    for loss in matching_losses(method, roles, train_batch(method, roles, images=real_data(roles))):
        for role in roles.trained:
            some = any(g is not None and bool(g.any()) for g in gradients(loss.value, roles, role))
            # The student's loss goes through the heads, which its update leaves alone.
            assert some == (role == loss.role) or (loss.role, role) == ("student", "discriminator")
        with torch.no_grad():
            for p, g in zip(roles.trained[loss.role].values(), gradients(loss.value, roles, loss.role), strict=True):
                if g is not None:
                    p.sub_(0.01 * g)
        found.append(loss.role)
    assert found == ["fake", "discriminator", "student"]
    assert {"student_loss", "gan_loss"} <= set(loss.metrics)


@pytest.mark.parametrize("game", GAN_LOSSES)
def test_the_adversarial_losses_are_their_formulas(game: str) -> None:
    roles = adversaries()
    d = draw(DistributionMatching(), roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
    real, judge, rules = real_data(roles), roles.discriminator, GAN_LOSSES[game]
    assert judge is not None
    x_real = expand(tiny.TABLE.alpha(d.tau), real.x0) * real.x0 + expand(tiny.TABLE.sigma(d.tau), real.x0) * d.e
    theirs = [f.detach().requires_grad_() for f in roles.tokens("teacher", x_real, d.tau, real.cond)]
    logits = judge.logits(theirs, d.tau, 4)
    ours = judge.logits(roles.tokens("teacher", d.x_tau, d.tau, d.cond), d.tau, 4)
    slopes = torch.autograd.grad(logits.mean(1).sum(), theirs, create_graph=True)
    penalty = sum(g.square().flatten(1).sum(1) for g in slopes) / 2
    expected = (rules.real(logits) + rules.fake(ours) + 0.3 * penalty).mean()
    torch.testing.assert_close(
        discriminator_loss(DistributionMatching(gan=GanConfig(weight=1.0, loss=game, r1=0.3)), roles, d, real), expected
    )
    torch.testing.assert_close(
        adversarial_loss(DistributionMatching(gan=GanConfig(weight=1.0, loss=game)), ours), rules.student(ours).mean()
    )


def test_the_discriminator_is_told_the_step_count_that_the_student_took(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = replace(tiny.denoiser(), feature_layers=("inp", "to_q"))
    method = DistributionMatching(steps=(4, 2, 1), gan=GanConfig(weight=0.5))
    roles = make_roles(
        backbone, RolesConfig(rank=2), condition_values=method.condition_values, gan_step_counts=method.counts
    )
    told: list[int] = []
    logits = Discriminator.logits

    def watched(judge: Discriminator, tokens: Sequence[Tensor], tau: Tensor, steps: int) -> Tensor:
        told.append(steps)
        return logits(judge, tokens, tau, steps)

    monkeypatch.setattr(Discriminator, "logits", watched)
    for steps in method.counts:
        told.clear()
        list(matching_losses(method, roles, train_batch(method, roles, images=real_data(roles), steps=steps)))
        assert told == [steps] * 3  # of real data and the student's for the one, of the student's for the other


def test_features_are_of_the_guidance_that_student_and_teacher_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the one that a pipeline tells by default; of a network that is told none, conditions stay as they are."""
    told: list[list[float]] = []

    def watched(backbone: Backbone, network: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> list[Tensor]:
        told.append(cond[EMBEDDED].tolist())
        return features(backbone, network, x, tau, {k: v for k, v in cond.items() if k != EMBEDDED})

    monkeypatch.setattr("fewstep.roles.roles.features", watched)
    method = DistributionMatching(gan=GanConfig(weight=0.5))
    for scale in (2.5, None):
        roles = replace(adversaries(), embedded_guidance=scale)
        d = draw(method, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
        default = {EMBEDDED: torch.full((BATCH,), 3.5)}
        d, real = d._replace(cond={**d.cond, **default}), real_data(roles)
        discriminator_loss(method, roles, d, real._replace(cond={**real.cond, **default}))
        student_logits(method, roles, d)
        assert told == [[scale or 3.5] * BATCH] * 3
        told.clear()


def test_a_discriminator_hears_what_it_is_told() -> None:
    roles = make_roles(
        replace(tiny.denoiser(), feature_layers=("inp", "to_q")), RolesConfig(rank=2), gan_step_counts=(4, 2)
    )
    judge = roles.discriminator
    assert judge is not None
    tau = torch.full((BATCH,), 500.0).double()
    tokens = roles.tokens(
        "teacher", torch.randn((BATCH, *roles.backbone.shape), generator=seed()), tau, conditions(roles.backbone)[0]
    )
    assert not torch.allclose(judge.logits(tokens, tau, 4), judge.logits(tokens, tau, 2), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_heads_on_the_fake_score_train_it_too(lora: bool, shared: bool) -> None:
    """DMD2's discriminator: its loss is part of the fake score's update, and the student's goes through that score."""
    roles = adversaries(lora)
    fake = FakeScoreConfig(share_noised_sample=shared)
    own = DistributionMatching(gan=GanConfig(weight=0.5, features="fake", feature_weight=0.2, r1=0.1), fake=fake)
    frozen, found, layers = DistributionMatching(fake=fake), [], {}
    for loss in matching_losses(own, roles, train_batch(own, roles, images=real_data(roles))):
        found.append(loss.role)
        layers[loss.role] = gradients(loss.value, roles, loss.role)
        if loss.role == "discriminator":  # features are constants for the heads
            assert all(g is None for g in gradients(loss.value, roles, "fake"))
    assert found == ["fake", "discriminator", "student"]
    plain, _ = matching_losses(frozen, roles, train_batch(frozen, roles))
    denoising = gradients(plain.value, roles, "fake")
    with torch.no_grad():
        d = draw(frozen, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=False)
    judged = discriminator_loss(own, roles, d, real_data(roles), of_features=True)
    if shared:  # the fake score's update and the student's have one x_tau
        for got, a, b in zip(layers["fake"], denoising, gradients(judged, roles, "fake"), strict=True):
            torch.testing.assert_close(got, (0 if a is None else a) + 0.2 * (0 if b is None else b))
    assert any(bool(g.any()) for g in gradients(judged, roles, "fake") if g is not None)


def test_heads_on_the_fake_score_read_it() -> None:
    roles = adversaries()
    x, tau = torch.randn((BATCH, *roles.backbone.shape), generator=seed()), torch.full((BATCH,), 500.0).double()
    cond, _ = conditions(roles.backbone)
    d = draw(DistributionMatching(), roles, cond, BATCH, seed(), with_gradient=False)._replace(x_tau=x, tau=tau)
    of = {f: student_logits(DistributionMatching(gan=GanConfig(weight=1.0, features=f)), roles, d) for f in TRAINED_BY}
    assert not torch.equal(of["teacher"], of["fake"])
    with torch.no_grad():
        for p in roles.trained["fake"].values():
            p.add_(0.1)
    again = {
        f: student_logits(DistributionMatching(gan=GanConfig(weight=1.0, features=f)), roles, d) for f in TRAINED_BY
    }
    assert torch.equal(of["teacher"], again["teacher"]) and not torch.equal(of["fake"], again["fake"])


def test_nothing_trains_the_fake_scores_features_while_heads_wait() -> None:
    roles = adversaries()
    method = DistributionMatching(gan=GanConfig(weight=0.5, features="fake"), warmup=3)
    (loss,) = matching_losses(method, roles, train_batch(method, roles, images=real_data(roles), warming_up=True))
    assert loss.role == "fake" and torch.equal(loss.value.detach(), loss.metrics["fake_loss"])


def test_features_without_a_discriminator_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gan\.features: got fake with .*gan\.weight=0"):
        GanConfig(features="fake")
