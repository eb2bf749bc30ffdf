"""Both games against their formulas, and R1 against the gradient of a known function."""

import pytest
import torch

from fewstep.methods.matching_settings import GanConfig
from fewstep.objectives.adversarial import GAN_LOSSES, gradient_penalty


def test_hinge() -> None:
    d = torch.tensor([[0.0, 2.0], [-3.0, 0.5]])
    game = GAN_LOSSES["hinge"]
    torch.testing.assert_close(game.real(d), torch.tensor([0.5, (4 + 0.5) / 2]))
    torch.testing.assert_close(game.fake(d), torch.tensor([(1 + 3) / 2, (0 + 1.5) / 2]))
    torch.testing.assert_close(game.student(d), torch.tensor([-1.0, 1.25]))


def test_non_saturating() -> None:
    d = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    game, p = GAN_LOSSES["non-saturating"], d.sigmoid()
    torch.testing.assert_close(game.real(d), -p.log().mean(1))
    torch.testing.assert_close(game.fake(d), -(1 - p).log().mean(1))
    torch.testing.assert_close(game.student(d), -p.log().mean(1))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_the_student_wants_what_the_discriminator_calls_real(name: str) -> None:
    d = torch.zeros(1, 1, requires_grad=True)
    game = GAN_LOSSES[name]
    for side, sign in ((game.student, -1), (game.real, -1), (game.fake, 1)):
        (gradient,) = torch.autograd.grad(side(d).sum(), d)
        assert gradient.sign().item() == sign


def test_gradient_penalty() -> None:
    x, y = (torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in (0, 1))
    logits = (x.square() + 3 * y).flatten(1).sum(1)
    gradients = torch.autograd.grad(logits.sum(), (x, y), create_graph=True)
    torch.testing.assert_close(gradient_penalty(list(gradients)), (2 * x).square().flatten(1).sum(1) / 2 + 4 * 9 / 2)
    (again,) = torch.autograd.grad(gradient_penalty(list(gradients)).sum(), x)
    torch.testing.assert_close(again, 4 * x)  # it can be trained through


def test_unknown_game_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"^gan\.loss: got 'lsgan', allowed are hinge, non-saturating$"):
        GanConfig(loss="lsgan")
