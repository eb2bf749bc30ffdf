"""A reward beside matching: by its gradient, and by preference through a third network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    draw,
    reward_term,
    surrogate_loss,
)
from fewstep.methods.matching_settings import RewardConfig
from fewstep.methods.method import TrainBatch
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.objectives.rewards import Reward
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.runs.rewards import reward_of
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.state import seeded

from .. import tiny
from .common import BATCH, conditions, gradients, seed, train_batch, walked

GROUP = 4
WORDS = ("red cat", "blue dog", "a photo of a green house")


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def rewarded(by: str, weight: float = 1.0, **settings: Any) -> DistributionMatching:
    reward = RewardConfig(weight=weight, by=by, group=GROUP)  # type: ignore[arg-type]
    return DistributionMatching(warmup=1, reward=reward, **settings)


def roles_with(method: DistributionMatching, reward: Reward = bright, lora: bool = True) -> Roles:
    return replace(roles_for(tiny.denoiser(), method, RolesConfig(lora=lora, rank=2)), reward=reward)


def moved(roles: Roles) -> Roles:
    """Roles in general position."""
    with torch.no_grad():
        for own in roles.trained.values():
            for p in own.values():
                p.add_(0.1 * torch.randn(p.shape, generator=seed(3)))
    return roles


def grouped(method: DistributionMatching, roles: Roles) -> TrainBatch:
    prompts = tuple(WORDS[i // GROUP] for i in range(BATCH))
    return train_batch(method, roles)._replace(cond=roles.backbone.encode(list(prompts)), prompts=prompts)


def test_a_differentiable_reward_pulls_by_its_own_gradient() -> None:
    method, seen = rewarded("gradient"), list[tuple[Tensor, tuple[str, ...]]]()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((images, tuple(prompts)))
        return images.square().flatten(1).sum(1)

    roles = moved(roles_with(method, reward))
    assert "reward" not in roles.trained
    batch = grouped(method, roles)
    d = draw(method, roles, batch.cond, BATCH, seed(), with_gradient=True)
    term, logged = reward_term(method, roles, d, batch.null, batch.prompts)
    assert torch.equal(seen[0][0], d.x0) and seen[0][1] == batch.prompts
    expected = -d.x0.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(logged["reward"], -expected.detach())
    for a, b in zip(gradients(term, roles, "student"), gradients(expected, roles, "student"), strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_shares_tau_and_noise_and_only_the_third_network_learns() -> None:
    method, seen = rewarded("preference", steps=2), list[Tensor]()
    roles = moved(roles_with(method))
    batch = grouped(method, roles)
    handle = roles.backbone.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    loss = surrogate_loss(method, roles, batch, 2)
    handle.remove()
    tau = seen[-1]
    assert loss.role == "reward" and set(loss.metrics) == {"surrogate_loss", "reward"}
    assert len(tau[:GROUP].unique()) == len(tau[GROUP:].unique()) == 1 and tau[0] != tau[-1]
    for role in roles.trained:
        assert any(g is not None and bool(g.any()) for g in gradients(loss.value, roles, role)) == (role == "reward")


def test_a_preference_pulls_along_surrogate_minus_teacher() -> None:
    """At first both are the teacher, and nothing is pulled."""
    method = rewarded("preference", loss="l2")
    roles = roles_with(method)
    batch = grouped(method, roles)
    d = draw(method, roles, batch.cond, BATCH, seed(), with_gradient=True)
    assert not any(
        g is not None and g.any()
        for g in gradients(reward_term(method, roles, d, batch.null, batch.prompts)[0], roles, "student")
    )
    moved(roles)
    d = draw(method, roles, batch.cond, BATCH, seed(), with_gradient=True)
    d = d._replace(x_m=d.x_m.detach().requires_grad_(True))
    (pull,) = torch.autograd.grad(reward_term(method, roles, d, batch.null, batch.prompts)[0], d.x_m)
    with torch.no_grad():
        surrogate = roles.denoise("reward", batch.cond, 4)(d.x_tau, d.tau).x0
        teacher = roles.teacher(batch.cond, batch.null, Guidance())(d.x_tau, d.tau).x0
    normaliser = (d.x0 - surrogate).abs().flatten(1).mean(1).view(-1, *[1] * (d.x0.ndim - 1))
    torch.testing.assert_close(pull * BATCH * normaliser, teacher - surrogate, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by", ["gradient", "preference"])
def test_the_reward_rises(by: str) -> None:
    """Without a reward the student stays where the teacher is."""
    words, found = embed(tiny.denoiser(), tiny.WORDS, None, ""), {}
    for weight in (0.0, 30.0):
        method = rewarded(by, weight)
        roles = roles_with(method, lora=False)
        roles = roles if weight else replace(roles, reward=None)
        train = TrainConfig(iterations=25, batch=16, lr=3e-3, fake_lr=1e-2, ema=0.0)
        for _ in distill(roles, method, words, train):
            pass
        with torch.no_grad():
            cond = conditions(roles.backbone, 64)[0]
            found[weight] = float(draw(method, roles, cond, 64, seed(5), False, 1).x0.mean())
    assert found[30.0] > found[0.0] + 0.05


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("by", "lora"), [("gradient", True), ("preference", True), ("preference", False)])
def test_a_stopped_run_equals_the_uninterrupted_one(by: str, lora: bool, precision: str, tmp_path: Path) -> None:
    method = rewarded(by)
    words = embed(tiny.denoiser(), tiny.WORDS, None, "")
    train = TrainConfig(iterations=6, batch=8, checkpoint_every=2, precision=precision)  # type: ignore[arg-type]

    def run(place: Path, stop: int) -> Roles:
        roles = roles_with(method, lora=lora)
        for step in distill(roles, method, words, train, place):
            if step.iteration == stop:
                break
        return roles

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "stopped", 3)
    again = run(tmp_path / "stopped", 6)
    assert set(whole.trained) == {"student", "fake"} | ({"reward"} if by == "preference" else set())
    for role, own in whole.trained.items():
        for name, p in own.items():
            assert torch.equal(p, again.trained[role][name]), (role, name)
    assert all(torch.equal(p, again.average[name]) for name, p in whole.average.items())


def test_groups_of_a_batch_have_one_prompt_and_their_own_words() -> None:
    seen = list[tuple[str, ...]]()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(tuple(prompts))
        return bright(images, prompts)

    method = rewarded("preference")
    roles, words = roles_with(method, reward), embed(tiny.denoiser(), tiny.WORDS, None, "")
    for _ in distill(roles, method, words, TrainConfig(iterations=2, batch=8)):
        pass
    assert all(len(set(p[:GROUP])) == len(set(p[GROUP:])) == 1 for p in seen)
    assert {word for p in seen for word in p} <= set(tiny.WORDS)


@pytest.mark.parametrize("by", ["gradient", "preference"])
def test_a_reward_goes_with_a_regression_on_trajectories_of_other_prompts(by: str) -> None:
    method, seen = rewarded(by, regression_weight=1.0), list[tuple[Tensor, tuple[str, ...]]]()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((images, tuple(prompts)))
        return bright(images, prompts)

    roles, teacher = roles_with(method, reward), tiny.denoiser()
    paths = walked(TrajectoryImitation(steps=4), teacher)
    words, train = embed(teacher, tiny.WORDS, None, ""), TrainConfig(iterations=2, batch=8)
    *_, last = distill(roles, method, words, train, paths=paths)
    assert {"reward", "regression_loss"} <= set(last.metrics)
    drawn = paths.draw(8, seeded(train.seed, 1, "paths"), torch.device("cpu")).prompts
    assert len(seen[-1][1]) == 8 and (seen[-1][1] == drawn) == (by == "gradient")


def test_the_teacher_is_untouched_and_the_surrogate_is_not_the_fake_score() -> None:
    method = rewarded("preference")
    teacher = tiny.denoiser()
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    roles = make_roles(teacher, RolesConfig(rank=2), surrogate=True)
    roles = replace(roles, reward=bright)
    for _ in distill(roles, method, embed(teacher, tiny.WORDS, None, ""), TrainConfig(iterations=4, batch=8, lr=1e-2)):
        pass
    cond, _ = conditions(teacher)
    x, t = torch.randn((BATCH, *teacher.shape), generator=seed()), torch.full((BATCH,), 500.0).double()
    with torch.no_grad():
        drawn = {role: roles.denoise(role, cond)(x, t).x0 for role in ("student", "fake", "reward")}
    assert not torch.equal(drawn["reward"], drawn["fake"])
    after = {k.replace(".base_layer.", "."): v for k, v in teacher.module.state_dict().items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"solver": "renoise"},
            r"reward\.by: got preference with method\.solver=renoise, which has states that do not",
        ),
        ({"match": {"divergence": "fisher"}}, r"got preference with method\.match\.divergence=fisher"),
        ({"match": {"state": "clean"}}, r"got preference with method\.match\.state=clean"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("method\\.", "(method\\.)?")):
        fewstep.method("tdm", reward={"weight": 1.0, "by": "preference"}, **settings)


def test_a_run_says_what_its_reward_lacks() -> None:
    words = embed(tiny.denoiser(), tiny.WORDS, None, "")
    train = TrainConfig(iterations=3, batch=8)
    preferred = rewarded("preference")
    with pytest.raises(
        ValueError, match=r"train\.batch: got 6, allowed are multiples of method\.reward\.group \(4\).*8$"
    ):
        next(distill(roles_with(preferred), preferred, words, replace(train, batch=6)))
    with pytest.raises(ValueError, match="reward: method tdm needs reward"):
        next(distill(replace(roles_with(preferred), reward=None), preferred, words, train))
    by_gradient = rewarded("gradient")
    roles = roles_with(by_gradient, lambda images, prompts: bright(images, prompts).detach())
    with pytest.raises(ValueError, match=r"reward\.by: got gradient, but this reward has none"):
        list(distill(roles, by_gradient, words, train))
    roles = roles_with(by_gradient, lambda images, prompts: images.mean())
    with pytest.raises(ValueError, match=r"reward: got a tensor \[\] for 8 images"):
        list(distill(roles, by_gradient, words, train))


@pytest.mark.parametrize(
    ("reward", "given", "message"),
    [
        ({"weight": 1.0}, None, r"reward\.scorer: got '', allowed are brightness, .*clip_score.*function in Python"),
        ({"weight": 1.0, "scorer": "beauty"}, None, r"reward\.scorer: got 'beauty', allowed are brightness"),
        (
            {"weight": 1.0, "scorer": "pickscore"},
            None,
            r"reward\.by: got gradient with method\.reward\.scorer=pickscore",
        ),
        ({"weight": 1.0, "scorer": "contrast"}, bright, r"reward\.scorer: got contrast next to a function"),
        ({}, bright, r"reward: got one, but method tdm takes none"),
    ],
)
def test_a_reward_is_named_or_given(reward: dict[str, Any], given: Reward | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_of(fewstep.method("tdm", reward=reward), given)


def test_a_function_is_a_reward_in_python(tmp_path: Path) -> None:
    seen = list[int]()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(len(prompts))
        return bright(images, prompts)

    method = fewstep.method("tdm", warmup=1, reward={"weight": 1.0, "by": "preference", "group": 4})
    train = TrainConfig(iterations=2, batch=8)
    steps = list(fewstep.distill(tiny.denoiser(), method, list(tiny.WORDS), train=train, reward=reward, watch=None))
    assert seen == [8, 8]
    assert "reward" in steps[-1].metrics and "reward_grad" in steps[-1].metrics
