"""Distances against closed forms."""

import math

import pytest
import torch

from fewstep.evaluation.distances import (
    Moments,
    frechet_distance,
    kernel_distance,
    kernel_reference,
    moments,
    paired_distance,
    principal_components,
)


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_two_gaussians_on_common_axes() -> None:
    """`|m - n|^2 + sum (s_i - t_i)^2` in any rotation."""
    rotation = torch.linalg.qr(normal(5, 5, 0)).Q
    s, t = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.0]), torch.tensor([1.5, 1.0, 0.25, 3.5, 2.0])
    p, q = (
        Moments(m, rotation @ torch.diag(x.double() ** 2) @ rotation.T)
        for m, x in ((torch.zeros(5), s), (torch.ones(5), t))
    )
    assert frechet_distance(p, q) == pytest.approx(5 + (s - t).square().sum().item(), abs=1e-6)
    assert frechet_distance(q, p) == pytest.approx(frechet_distance(p, q), abs=1e-6)


def test_frechet_distance_where_the_covariances_do_not_commute() -> None:
    """In two dimensions `tr (P Q)^1/2 = sqrt(tr PQ + 2 sqrt(det PQ))`."""
    a, b = normal(2, 2, 1), normal(2, 2, 2)
    p, q = a @ a.T, b @ b.T
    root = math.sqrt(torch.trace(p @ q) + 2 * math.sqrt(torch.det(p @ q)))
    found = frechet_distance(Moments(torch.zeros(2).double(), p), Moments(torch.zeros(2).double(), q))
    assert found == pytest.approx((p.trace() + q.trace()).item() - 2 * root, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions() -> None:
    x, y = normal(10, 40, 0), 2 + 3 * normal(12, 40, 1)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-5)
    assert math.isfinite(frechet_distance(moments(x), moments(y)))
    assert frechet_distance(moments(x), moments(x + 0.5)) == pytest.approx(40 * 0.25, rel=1e-6)


def test_moments_are_torchs() -> None:
    x = normal(30, 4, 0).float()
    found = moments(x)
    torch.testing.assert_close(found.covariance, torch.cov(x.double().T))
    torch.testing.assert_close(found.mean, x.double().mean(0))
    with pytest.raises(ValueError, match="got 1; a covariance takes at least 2"):
        moments(x[:1])


def test_kernel_distance_of_one_distribution_is_zero_on_average_whatever_the_number_of_samples() -> None:
    found = torch.tensor(
        [kernel_distance(kernel_reference(normal(12, 6, 2 * i)), normal(20, 6, 2 * i + 1)) for i in range(400)]
    )
    assert abs(found.mean()) < 3 * found.std() / 20
    assert found.min() < 0


def test_kernel_distance_in_one_dimension() -> None:
    """`(xy + 1)^3` has the features 1, sqrt3 x, sqrt3 x^2, x^3: the squared distance of their means."""
    x, y = normal(2000, 1, 0), 0.5 * normal(2000, 1, 1) + 1
    powers = [(1.0, 0.0), (1.0, 1.25), (0.0, 1 + 3 * 0.25)]  # E x, E x^2, E x^3: of y mean 1, variance 1/4
    expected = 3 * (0 - 1) ** 2 + 3 * (1 - powers[1][1]) ** 2 + (0 - powers[2][1]) ** 2
    assert kernel_distance(kernel_reference(x), y) == pytest.approx(expected, rel=0.1)


def test_principal_components_find_the_plane() -> None:
    plane = torch.linalg.qr(normal(10, 2, 0)).Q
    x = normal(200, 2, 1) @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ plane.T + 5
    pca = principal_components(x, 2)
    torch.testing.assert_close(pca(x) @ pca.basis.T + pca.mean, x)
    torch.testing.assert_close(pca.basis.T @ pca.basis, torch.eye(2).double())
    torch.testing.assert_close(pca(x).var(0), pca.variance)
    assert pca.variance[0] > pca.variance[1]


@pytest.mark.parametrize("components", [0, 11, 40])
def test_components_that_cannot_be_had(components: int) -> None:
    with pytest.raises(ValueError, match=rf"components: got {components}; 11 features of width 40 have 1..10"):
        principal_components(normal(11, 40, 0), components)


def test_paired_distance_is_relative_to_the_reference() -> None:
    r = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert paired_distance(r, r) == 0
    assert paired_distance(2 * r, r) == pytest.approx(1)
    assert paired_distance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), r) == pytest.approx(0.5)
    assert math.isnan(paired_distance(r * math.nan, r))
