"""Folding a head away: while the fake score warms up, the student learns to land without it where it landed with it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.guidance import Guidance
from fewstep.core.solvers import sample
from fewstep.data.prompts import embed
from fewstep.heads.head import facts_of, make_head
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.method import TrainBatch, student_of
from fewstep.methods.trajectory_imitation import TrajectoryImitation, absorb_head
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill

from .. import tiny
from .common import BATCH, conditions, seed, walked

METHOD = DistributionMatching(steps=3, init_head="absorb", warmup=2, guidance=Guidance(scale=1.0))


def begun(move: float = 0.05) -> Roles:
    """A student in general position that begins with a head in general position."""
    backbone, paths = tiny.denoiser(), walked(TrajectoryImitation(steps=3))
    head = make_head(
        "span",
        tiny.TABLE,
        facts_of(tiny.TABLE, paths.whole, paths.grid, paths.states[:, -1], [METHOD.times(tiny.TABLE)]),
    )
    roles = make_roles(backbone, RolesConfig(rank=8), head_to_absorb=head)
    with torch.no_grad():
        for p in (*roles.trained["student"].values(), *head.parameters()):
            p.add_(move * torch.randn(p.shape, generator=seed(p.numel())))
    roles.update_average(0.0)
    return roles


def ends(roles: Roles, head: bool) -> Tensor:
    """Where the student ends from noise that it was not trained on."""
    cond, _ = conditions(roles.backbone)
    x = torch.randn((BATCH, *roles.backbone.shape), generator=seed(99))
    with torch.no_grad():
        denoise, times = student_of(METHOD, roles, cond), METHOD.times(tiny.TABLE)
        *_, last = sample(denoise, tiny.TABLE, x, times, correct=roles.head_to_absorb if head else None)
    return last.x


def train_batch(roles: Roles, iteration: int = 0) -> TrainBatch:
    return TrainBatch(iteration, 9, BATCH, *conditions(roles.backbone), None, seed(iteration))


@pytest.mark.slow
def test_folded_away_a_head_is_hardly_missed() -> None:
    """Without it the student ends much nearer to where it ended with it than where the head is simply left out."""
    roles = begun()
    before, dropped = ends(roles, head=True), ends(roles, head=False)
    parameters = list(roles.trained["student"].values())
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for i in range(100):
        for loss in absorb_head(METHOD, roles, train_batch(roles, i)):
            for p, g in zip(parameters, torch.autograd.grad(loss.value, parameters, allow_unused=True), strict=True):
                p.grad = g
            optimizer.step()
    missed = (dropped - before).norm()
    assert missed > 0.1 * before.norm()
    assert (ends(roles, head=False) - before).norm() < 0.45 * missed


def test_it_is_folded_while_the_fake_score_warms_up_and_never_after() -> None:
    """The head is absorbed during the warm-up and never after.

    The goal comes from the average, which is the student as it began. Where both are the same and the head adds
    nothing, nothing is left to learn.
    """
    roles = begun()
    for iteration, expected in (
        (0, ["fake", *["student"] * 3]),
        (1, ["fake", *["student"] * 3]),
        (2, ["fake", "student"]),
    ):
        found = list(METHOD.losses(roles, train_batch(roles, iteration)))
        assert [loss.role for loss in found] == expected
        assert ("absorb_loss" in found[-1].metrics) == (iteration < 2)
    assert not any(name.startswith("head") for name in roles.trained["student"])
    values = [float(loss.value.detach()) for loss in absorb_head(METHOD, roles, train_batch(roles))]
    assert values[0] > 1e-3
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.mul_(1.5)
    assert [
        float(loss.value.detach()) for loss in absorb_head(METHOD, roles, train_batch(roles))
    ] != values  # the student has moved
    roles.update_average(0.0)
    with torch.no_grad():
        for p in roles.head_to_absorb.parameters() if roles.head_to_absorb is not None else ():
            p.zero_()
    assert all(float(loss.value.detach()) == 0 for loss in absorb_head(METHOD, roles, train_batch(roles)))


def test_the_methods_own_updates_begin_as_if_nothing_had_been_folded() -> None:
    """The first update after absorbing moves every weight by Adam's rate.

    With moments of other gradients it would be anything. The absorbing ends at rest.
    """
    roles, lr = begun(), 1e-3
    data = embed(roles.backbone, tiny.WORDS, None, "tiny")
    config = TrainConfig(iterations=4, batch=4, lr=lr, fake_lr=1e-3, clip=1e9)
    assert [config.lr_at("student", i, METHOD.warmup) for i in range(4)] == [lr, lr / 2, lr, lr]
    states: list[list[Tensor]] = []
    for _ in distill(roles, METHOD, data, config):
        states.append([p.detach().clone() for p in roles.trained["student"].values()])
    moved = torch.cat([(b - a).flatten() for a, b in zip(states[1], states[2], strict=True)]).abs()
    assert float(moved.median()) == pytest.approx(lr, rel=0.02)
    assert float(moved.max()) < 1.05 * lr
    folded = torch.cat([(b - a).flatten() for a, b in zip(states[0], states[1], strict=True)]).abs()
    assert float(folded.max()) > 0.75 * lr  # several updates of half the rate


@pytest.mark.parametrize(("settings", "expected"), [
    ({"warmup": 0}, "init_head: got absorb with warmup=0"),
    ({"solver": "renoise"}, "init_head: got absorb with solver=renoise"),
    ({"init_head": "span"}, "init_head: got 'span', allowed are keep, absorb, drop"),
])  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(METHOD, **settings)


def test_a_training_that_ends_before_its_warm_up_folds_nothing() -> None:
    roles = begun()
    data = embed(roles.backbone, tiny.WORDS, None, "tiny")
    with pytest.raises(
        ValueError,
        match=r"train\.iterations: got 2, of which the first 2 \(method\.warmup\) do not train the student; set more",
    ):
        next(distill(roles, METHOD, data, TrainConfig(iterations=2, batch=4, lr=1e-3, fake_lr=1e-3)))
