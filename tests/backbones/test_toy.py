"""The closed forms hold. Their scores are gradients of their log densities, and their flow is the probability flow."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.backbones.toy import Gaussian, Mixture
from fewstep.core.schedule import EDM, Flow, Schedule, diffuse, expand
from fewstep.core.solvers import heun

from ..tiny import TABLE

DATA = Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.02], dtype=torch.float64))
RING = Mixture.ring()
PROCESSES = [(TABLE, [19.0, 400, 900]), (Flow(), [0.05, 0.5, 0.95]), (EDM(), [0.05, 1, 40])]


def log_density(data: Gaussian | Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of `x_t = alpha x0 + sigma eps`, up to a constant."""
    if isinstance(data, Gaussian):
        var = alpha**2 * data.var + sigma**2
        return (-0.5 * (x - alpha * data.mean) ** 2 / var).sum(1)
    var = alpha**2 * data.std**2 + sigma**2
    return torch.logsumexp(-0.5 * ((x[:, None] - alpha[:, None] * data.means) ** 2).sum(2) / var, dim=1)


@pytest.mark.parametrize("data", [DATA, RING], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("schedule", "times"), PROCESSES)
def test_denoisers_are_the_scores_of_their_densities(
    data: Gaussian | Mixture, schedule: Schedule, times: list[float]
) -> None:
    """`-eps_hat/sigma = grad log p_t` and `alpha x0_hat + sigma eps_hat = x`."""
    t = torch.tensor(times, dtype=torch.float64).repeat_interleave(20)
    rng = torch.Generator().manual_seed(0)
    x = diffuse(
        schedule, data.draw(60, rng), t, torch.randn((60, 2), generator=rng, dtype=torch.float64)
    ).requires_grad_()
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    score = torch.autograd.grad(log_density(data, x, alpha, sigma).sum(), x)[0]
    here = data.denoise(schedule, x, t)
    torch.testing.assert_close(-here.eps / sigma, score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(alpha * here.x0 + sigma * here.eps, x)


@pytest.mark.parametrize(("schedule", "times"), PROCESSES)
def test_gaussian_flow_is_the_probability_flow(schedule: Schedule, times: list[float]) -> None:
    """It composes, it undoes itself, and 200 Heun steps find it."""
    a, b, c = (torch.full((5,), u, dtype=torch.float64) for u in times)
    x = (
        torch.randn((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * expand(schedule.sigma(c), DATA.mean)[:, None]
    )
    direct = DATA.flow(schedule, x, c, a)
    torch.testing.assert_close(DATA.flow(schedule, DATA.flow(schedule, x, c, b), b, a), direct)
    torch.testing.assert_close(DATA.flow(schedule, direct, a, c), x)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    walk = (times[2] ** 0.5 + grid * (times[0] ** 0.5 - times[2] ** 0.5)) ** 2
    if schedule.resolution:
        walk = walk.round().unique().flip(0)
    *_, last = heun(lambda x, t: DATA.denoise(schedule, x, t), schedule, x, walk)
    torch.testing.assert_close(last.x, direct, rtol=1e-2, atol=1e-3)


def test_draws_have_the_stated_moments() -> None:
    n = 50_000
    x = DATA.draw(n, torch.Generator().manual_seed(0))
    assert bool(((x.mean(0) - DATA.mean).abs() < 5 * (DATA.var / n).sqrt()).all())
    assert bool(((x.var(0) / DATA.var - 1).abs() < 5 * (2 / n) ** 0.5).all())
    ring = Mixture.ring(modes=6, radius=2.0, std=0.1)
    y = ring.draw(n, torch.Generator().manual_seed(0))
    nearest = torch.cdist(y, ring.means).min(1)
    assert bool(((torch.bincount(nearest.indices) / n - 1 / 6).abs() < 5 * (5 / 36 / n) ** 0.5).all())
    assert nearest.values.square().mean().item() == pytest.approx(2 * 0.1**2, rel=0.05)


def test_ring() -> None:
    ring = Mixture.ring(modes=4, radius=0.5, std=0.1)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.cdist(ring.means, ring.means)[0, 1].item() == pytest.approx(0.5 * math.sqrt(2))
