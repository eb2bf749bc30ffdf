"""The shape that trajectories share: coordinates, and the fit of a quadratic, an exponential and a Gamma term."""

import pytest
import torch

from fewstep.backbones.toy import Gaussian, Mixture
from fewstep.core.schedule import EDM, expand
from fewstep.core.solvers import heun
from fewstep.heads.curve import basis, coordinates, fit_curve

S = torch.linspace(0, 1, 61, dtype=torch.float64)


def walked(data: Gaussian | Mixture, n: int = 64, dimensions: int = 64) -> torch.Tensor:
    schedule = EDM()
    x = 80 * torch.randn((n, dimensions), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = schedule.at(1 - S)
    return torch.stack([s.x for s in heun(lambda x, t: data.denoise(schedule, x, t), schedule, x, grid)], 1)


def gaussian(dimensions: int = 64) -> Gaussian:
    return Gaussian(torch.zeros(dimensions).double(), torch.linspace(0.01, 2, dimensions).double())


def test_coordinates_are_those_of_a_made_up_curve() -> None:
    """Trajectories along known directions of each sample give their coordinates back.

    A coordinate's sign is turned to its larger side.
    """
    rng = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn((5, 20, 3), generator=rng, dtype=torch.float64))[0]
    true = torch.stack([1 - S, torch.sin(torch.pi * S) * 0.3, torch.sin(2 * torch.pi * S) * torch.exp(-S) * 0.1], 1)
    true[:, 2] -= (
        true[:, 1] * (true[:, 2] @ true[:, 1]) / (true[:, 1] @ true[:, 1])
    )  # principal coordinates do not correlate
    c, share = coordinates(7 * torch.einsum("je,nde->njd", true, frames))
    torch.testing.assert_close(c[:, :2], true[:, :2])
    largest = true[true[:, 2].abs().argmax(), 2].sign()
    torch.testing.assert_close(c[:, 2], largest * true[:, 2])
    assert share.max() < 1e-20


def test_two_components_explain_what_is_orthogonal_to_the_way_itself() -> None:
    _, share = coordinates(walked(gaussian()))
    assert share.max() < 1e-2


def test_the_sum_of_terms_fits_an_exact_teacher_and_one_term_alone_does_not() -> None:
    c, _ = coordinates(walked(gaussian()))
    curve = fit_curve(S, c)
    assert bool((curve.r2 >= torch.tensor([0.9999, 0.9965, 0.99])).all())
    torch.testing.assert_close((curve.at(S) - c).square().sum(0) / (c - c.mean(0)).square().sum(0), 1 - curve.r2)
    quadratic = basis(S, torch.zeros(3).double())[:, :3]
    w = c[:, 2:]
    rest = w - quadratic @ torch.linalg.lstsq(quadratic, w).solution
    assert 1 - rest.square().sum() / (w - w.mean()).square().sum() < 0.9


def test_one_curve_serves_every_step_count() -> None:
    """It is a function of time, fitted once: off the grid it is as near as on it."""
    c, _ = coordinates(walked(gaussian()))
    curve = fit_curve(S[::2], c[::2])
    on, off = ((curve.at(S[part]) - c[part]).abs().amax(0) for part in (slice(0, None, 2), slice(1, None, 2)))
    assert bool((off < 1.5 * on).all())


def test_what_the_curve_says_of_a_state_is_its_place() -> None:
    curve = fit_curve(S, coordinates(walked(gaussian()))[0])
    assert curve.size.min() > 0
    assert curve.at(S)[0, 0] == pytest.approx(1, abs=0.02)
    assert curve.at(S)[-1].abs().max() < 0.05
    assert expand(S, torch.zeros(61, 2)).shape == (61, 1)
