"""The surrogate losses have the gradients of their formulas, and on Gaussians that of the divergence itself."""

import pytest
import torch
from torch import Tensor

from fewstep.backbones.toy import Gaussian
from fewstep.core.schedule import EDM, VP, Flow, Schedule, expand, transition
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.objectives.reverse_kl import SURROGATE_LOSSES, dmd_normaliser, huber, huber_elementwise, l2

SHAPE = (3, 4, 5, 5)
D = 4 * 5 * 5


def made_up(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, delta = torch.randn((2, *SHAPE), generator=rng, dtype=torch.float64)
    return x.requires_grad_(), scale * delta, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), x)[0]


def test_l2() -> None:
    x, delta, n = made_up()
    value = l2(x, delta, n)
    torch.testing.assert_close(value, 0.5 * (delta / expand(n, x)).square().flatten(1).sum(1))
    torch.testing.assert_close(gradient(value, x), delta / expand(n, x))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_huber(scale: float) -> None:
    """Eq. 11: `sqrt(||delta||^2 + c^2) - c` with c = 0.00054 sqrt(d)."""
    x, delta, n = made_up(scale)
    c = 0.00054 * D**0.5
    square = delta.square().flatten(1).sum(1)
    value = huber(x, delta, n)
    torch.testing.assert_close(value, (square + c**2).sqrt() - c, rtol=1e-6, atol=1e-12)
    got = gradient(value, x)
    torch.testing.assert_close(got, delta / expand((square + c**2).sqrt(), x), rtol=1e-6, atol=1e-9)
    assert bool((got.flatten(1).norm(dim=1) <= 1 + 1e-12).all())


def test_huber_has_unit_gradients_far_out_and_ignores_the_normaliser() -> None:
    x, delta, n = made_up(100.0)
    got = gradient(huber(x, delta, n), x)
    torch.testing.assert_close(got.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(got, gradient(huber(x, delta, 7 * n), x))


def test_huber_elementwise() -> None:
    x, delta, n = made_up()
    scaled, c = delta / expand(n, x), 1e-3
    value = huber_elementwise(x, delta, n)
    torch.testing.assert_close(value, ((scaled.square() + c**2).sqrt() - c).flatten(1).sum(1))
    got = gradient(value, x)
    torch.testing.assert_close(got, scaled / (scaled.square() + c**2).sqrt(), rtol=1e-6, atol=1e-9)
    assert bool((got.abs() <= 1).all())


def test_the_constants_of_huber_are_read() -> None:
    x, delta, n = made_up()
    assert not torch.allclose(gradient(huber(x, delta, n, c=10.0), x), gradient(huber(x, delta, n), x))
    assert not torch.allclose(
        gradient(huber_elementwise(x, delta, n, c=10.0), x), gradient(huber_elementwise(x, delta, n), x)
    )


@pytest.mark.parametrize("name", SURROGATE_LOSSES)
def test_no_difference_no_gradient(name: str) -> None:
    x, delta, n = made_up()
    value = SURROGATE_LOSSES[name](x, torch.zeros_like(delta), n)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient(value, x), torch.zeros(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("name", SURROGATE_LOSSES)
def test_a_batch_is_its_samples(name: str) -> None:
    """Per sample throughout: nothing of one sample, its normaliser least of all, reaches another."""
    x, delta, _ = made_up()
    x0, f_teacher = x.detach() + 1, x.detach() * expand(torch.tensor([0.1, 1.0, 5.0]), delta)

    def loss(rows: slice) -> Tensor:
        return SURROGATE_LOSSES[name](x[rows], delta[rows], dmd_normaliser(x0[rows], f_teacher[rows]))

    torch.testing.assert_close(loss(slice(0, 3)), torch.cat([loss(slice(i, i + 1)) for i in range(3)]))
    torch.testing.assert_close(
        gradient(loss(slice(0, 3)), x), sum(gradient(loss(slice(i, i + 1)), x) for i in range(3))
    )


def test_normaliser_is_the_mean_distance_of_each_sample() -> None:
    x0 = torch.zeros(2, 1, 2, 2)
    f_teacher = torch.stack([torch.full((1, 2, 2), -0.5), torch.tensor([[[1.0, 2], [3, 4]]])]).requires_grad_()
    n = dmd_normaliser(x0, f_teacher)
    assert n.tolist() == [0.5, 2.5]
    assert not n.requires_grad
    assert dmd_normaliser(x0, x0).min() > 0


def test_unknown_loss_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"^loss: got 'l1', allowed are l2, huber, huber-elementwise$"):
        DistributionMatching(loss="l1")


def kl(mean: Tensor, var: Tensor, mean2: Tensor, var2: Tensor) -> Tensor:
    """`KL(N(mean, var) || N(mean2, var2))`, diagonal."""
    return 0.5 * ((var2 / var).log() + (var + (mean - mean2) ** 2) / var2 - 1).sum()


TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))


@pytest.mark.parametrize(
    ("schedule", "landing", "tau"),
    [
        (TABLE, 249, 499),
        (TABLE, -1, 120),
        (TABLE, 499, 700),
        (Flow(), 0.25, 0.45),
        (Flow(), 0.5, 0.75),
        (EDM(t_max=5), 0.4, 1.5),
    ],
)
def test_on_gaussians_the_gradient_is_that_of_the_divergence(schedule: Schedule, landing: float, tau: float) -> None:
    """On Gaussians eq. 6 is the derivative of the KL divergence.

    A Gaussian student lands on `x_m = mean + scale z`; both scores at x_tau are known, and so is KL between the two
    laws of x_tau. Eq. 6 with the true scores, `(alpha/sigma^2) r E[delta dx_m]`, is then the derivative of KL with
    respect to the student's mean and scale. Monte Carlo over n draws, compared to 5 standard errors, which are below
    2 % of the largest derivative.
    """
    n, rng = 200_000, torch.Generator().manual_seed(0)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.9, 0.6], dtype=torch.float64, requires_grad=True)
    teacher = Gaussian(torch.tensor([0.0, 0.2], dtype=torch.float64), torch.tensor([0.3, 1.0], dtype=torch.float64))
    t, s = (torch.full((n,), u, dtype=torch.float64) for u in (tau, landing))
    r, beta = transition(schedule, s, t)

    z, e = torch.randn((2, n, 2), generator=rng, dtype=torch.float64)
    x_m = mean + scale * z
    x_tau = (expand(r, z) * x_m + expand(beta, z) * e).detach()
    alpha, sigma, ratio = schedule.alpha(t)[0], schedule.sigma(t)[0], r[0]
    law_mean, law_var = ratio * mean, (ratio * scale) ** 2 + beta[0] ** 2
    f_student = (x_tau - sigma**2 * (x_tau - law_mean.detach()) / law_var.detach()) / alpha
    delta = f_student - teacher.denoise(schedule, x_tau, t).x0

    value = l2(x_m, delta, torch.ones(n, dtype=torch.float64))
    got = torch.autograd.grad(value.mean(), (mean, scale))
    weight = alpha / sigma**2 * ratio  # the free lambda_tau of the loss, and dx_tau/dx_m
    exact = torch.autograd.grad(
        kl(law_mean, law_var, alpha * teacher.mean, alpha**2 * teacher.var + sigma**2), (mean, scale)
    )
    largest = max(g.abs().max() for g in exact)
    for mine, true, per_draw in zip(got, exact, (delta, delta * z), strict=True):
        error = weight * per_draw.std(0) / n**0.5
        assert bool((error < 0.02 * largest).all())
        assert bool(((weight * mine - true).abs() < 5 * error).all())
