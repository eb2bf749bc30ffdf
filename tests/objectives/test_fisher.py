"""On Gaussians the score-identity loss is the Fisher divergence. With c = 1/2 its gradient is half of the exact one."""

import pytest
import torch
from torch import Tensor

from fewstep.core.schedule import EDM, VP, Flow, Schedule, expand, transition
from fewstep.objectives.denoising import transition_target
from fewstep.objectives.fisher import fisher

SCHEDULES: dict[str, tuple[Schedule, float, float]] = {
    "edm": (EDM(80.0), 0.8, 2.5),
    "flow": (Flow(), 0.3, 0.7),
    "vp": (VP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)), 300.0, 700.0),
}
TEACHER = (0.4, 1.3)  # mean and variance of the data
N = 400_000


def f_gaussian(schedule: Schedule, x: Tensor, tau: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Clean estimate from the score of `N(mean, var)` at time tau."""
    sigma, alpha = expand(schedule.sigma(tau), x), expand(schedule.alpha(tau), x)
    return (x - sigma**2 * (x - mean) / var) / alpha


def terms(name: str, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f_teacher, f_fake, f_cond, and `E ||f_phi - f_psi||^2` in closed form.

    f_fake is exact for the student as it is, and held fixed.
    """
    schedule, at, later = SCHEDULES[name]
    t, tau = (torch.full((N,), s, dtype=torch.float64) for s in (at, later))
    rng = torch.Generator().manual_seed(0)
    z, e = torch.randn((2, N, 1), generator=rng, dtype=torch.float64)
    x_t = m + v.sqrt() * z
    r, beta = transition(schedule, t, tau)
    x = expand(r, x_t) * x_t + expand(beta, x_t) * e
    alpha, sigma = schedule.alpha(tau)[0], schedule.sigma(tau)[0]
    a, big = alpha * TEACHER[0], alpha**2 * TEACHER[1] + sigma**2
    b, own = r[0] * m, r[0] ** 2 * v + beta[0] ** 2
    f_cond, _ = transition_target(schedule, x_t, e, t, tau)
    exact = (sigma**2 / alpha) ** 2 * (((b - a) / big) ** 2 + own * (1 / own - 1 / big) ** 2)
    return f_gaussian(schedule, x, tau, a, big), f_gaussian(schedule, x, tau, b.detach(), own.detach()), f_cond, exact


def student() -> tuple[Tensor, Tensor]:
    return torch.tensor(1.1, dtype=torch.float64, requires_grad=True), torch.tensor(
        0.5, dtype=torch.float64, requires_grad=True
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_value_is_that_of_the_divergence(name: str) -> None:
    f_teacher, f_fake, f_cond, exact = terms(name, *student())
    values = fisher(f_teacher, f_fake, f_cond, torch.ones(N, dtype=torch.float64), correction=0.0)
    error = values.std() / N**0.5
    assert abs(values.mean() - exact) < 5 * error
    assert error < 0.05 * exact  # so that the line above says something


@pytest.mark.parametrize("name", SCHEDULES)
def test_half_the_correction_gives_the_exact_gradient(name: str) -> None:
    m, v = student()
    f_teacher, f_fake, f_cond, exact = terms(name, m, v)
    expected = torch.stack(torch.autograd.grad(exact, (m, v), retain_graph=True))
    found = {}
    for c in (0.0, 0.5, 1.0):
        loss = 2 * fisher(f_teacher, f_fake, f_cond, torch.ones(N, dtype=torch.float64), correction=c).mean()
        found[c] = torch.stack(torch.autograd.grad(loss, (m, v), retain_graph=True))
    scale = expected.abs().max()
    assert (found[0.5] - expected).abs().max() < 0.01 * scale
    assert (found[0.0] - expected).abs().max() > 0.05 * scale  # neither without the correction
    assert (found[1.0] - expected).abs().max() > 0.05 * scale  # nor with the full one


def test_equal_scores_have_no_gradient_and_the_normaliser_divides() -> None:
    rng = torch.Generator().manual_seed(0)
    f, cond = torch.randn((2, 3, 4), generator=rng, requires_grad=True)
    assert not fisher(f, f, cond, torch.ones(3)).any()
    other = torch.randn((3, 4), generator=rng)
    n = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(fisher(f, other, cond, n) * n, fisher(f, other, cond, torch.ones(3)))
    assert fisher(f, other, cond, n).shape == (3,)
