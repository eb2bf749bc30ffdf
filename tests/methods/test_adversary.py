"""The adversarial term: a role of its own, against real data."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import EMBEDDED, Cond
from fewstep.core.schedule import expand
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    FakeScoreConfig,
    GanConfig,
    adversarial_loss,
    discriminator_loss,
    draw,
    matching_losses,
)
from fewstep.methods.method import RealBatch
from fewstep.objectives.adversarial import GAN_LOSSES
from fewstep.roles.discriminator import Discriminator
from fewstep.roles.roles import TRAINED, Roles, RolesConfig, make_roles

from .. import tiny
from .common import BATCH, conditions, gradients, seed, train_batch


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
    theirs = [f.requires_grad_() for f in judge.tokens(x_real, d.tau, real.cond)]
    logits, ours = judge.logits(theirs, d.tau, 4), judge.logits(judge.tokens(d.x_tau, d.tau, d.cond), d.tau, 4)
    slopes = torch.autograd.grad(logits.mean(1).sum(), theirs, create_graph=True)
    penalty = sum(g.square().flatten(1).sum(1) for g in slopes) / 2
    expected = (rules.real(logits) + rules.fake(ours) + 0.3 * penalty).mean()
    torch.testing.assert_close(
        discriminator_loss(DistributionMatching(gan=GanConfig(weight=1.0, loss=game, r1=0.3)), roles, d, real), expected
    )
    torch.testing.assert_close(
        adversarial_loss(DistributionMatching(gan=GanConfig(weight=1.0, loss=game)), roles, d),
        rules.student(ours).mean(),
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
    tokens = Discriminator.tokens

    def watched(judge: Discriminator, x: Tensor, tau: Tensor, cond: Cond) -> list[Tensor]:
        told.append(cond[EMBEDDED].tolist())
        return tokens(judge, x, tau, {k: v for k, v in cond.items() if k != EMBEDDED})

    monkeypatch.setattr(Discriminator, "tokens", watched)
    method = DistributionMatching(gan=GanConfig(weight=0.5))
    for scale in (2.5, None):
        roles = replace(adversaries(), embedded_guidance=scale)
        d = draw(method, roles, conditions(roles.backbone)[0], BATCH, seed(), with_gradient=True)
        default = {EMBEDDED: torch.full((BATCH,), 3.5)}
        d, real = d._replace(cond={**d.cond, **default}), real_data(roles)
        discriminator_loss(method, roles, d, real._replace(cond={**real.cond, **default}))
        adversarial_loss(method, roles, d)
        assert told == [[scale or 3.5] * BATCH] * 3
        told.clear()


def test_a_discriminator_hears_what_it_is_told() -> None:
    roles = make_roles(
        replace(tiny.denoiser(), feature_layers=("inp", "to_q")), RolesConfig(rank=2), gan_step_counts=(4, 2)
    )
    judge = roles.discriminator
    assert judge is not None
    tau = torch.full((BATCH,), 500.0).double()
    tokens = judge.tokens(
        torch.randn((BATCH, *roles.backbone.shape), generator=seed()), tau, conditions(roles.backbone)[0]
    )
    assert not torch.allclose(judge.logits(tokens, tau, 4), judge.logits(tokens, tau, 2), atol=1e-4)
