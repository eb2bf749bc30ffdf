"""Rewards: advantages within a group, and the loss of a preference, against their closed forms."""

import pytest
import torch

from fewstep.objectives.rewards import REWARDS, advantages, group_preference

RNG = torch.Generator().manual_seed(0)


def test_an_advantage_is_over_the_groups_mean_in_deviations_of_all_rewards() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / rewards.std(correction=0)
    torch.testing.assert_close(advantages(rewards, 2), expected, rtol=1e-3, atol=0)


def test_equal_rewards_and_any_scale_change_nothing() -> None:
    assert not advantages(torch.full((6,), 3.0), 3).any()
    rewards = torch.randn(8, generator=RNG)
    torch.testing.assert_close(advantages(1000 * rewards - 7, 4), advantages(rewards, 4), rtol=1e-2, atol=1e-3)
    outlier = torch.zeros(64)
    outlier[0] = 1.0
    assert advantages(outlier, 64).max() == 5.0  # 7.8 deviations


def test_the_gradient_of_a_preference_is_that_of_its_formula() -> None:
    """`sigmoid(beta gain) A_i / G`, where gain is the group's mean of `A_i (e_i - e_i_ref)`."""
    errors = torch.rand(6, generator=RNG, dtype=torch.float64, requires_grad=True)
    reference, advantage = torch.rand((2, 6), generator=RNG, dtype=torch.float64)
    (found,) = torch.autograd.grad(group_preference(errors, reference, advantage, 3, 7.0).sum(), errors)
    gain = (advantage * (errors - reference)).detach().view(2, 3).mean(1)
    expected = torch.sigmoid(7.0 * gain).repeat_interleave(3) * advantage / 3
    torch.testing.assert_close(found, expected)


def test_a_preference_that_is_met_pulls_no_further() -> None:
    """The surrogate's errors are far below the teacher's where the advantage is positive, far above where negative."""
    errors = torch.tensor([0.0, 2.0], requires_grad=True)
    (found,) = torch.autograd.grad(
        group_preference(errors, torch.ones(2), torch.tensor([1.0, -1.0]), 2, 100.0).sum(), errors
    )
    assert float(found.abs().max()) < 1e-20


@pytest.mark.parametrize("name", REWARDS)
def test_each_reward_by_name_is_a_number_an_image_and_has_a_gradient(name: str) -> None:
    images = torch.rand((3, 3, 8, 8), generator=RNG).requires_grad_(True)
    found = REWARDS[name](images, ["a", "b", "c"])
    assert found.shape == (3,)
    assert torch.autograd.grad(found.sum(), images)[0].any()
