"""Distances between two sets of feature vectors. All of them are computed in float64 and returned as plain numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The Gaussian that the Frechet distance sees: mean [D], covariance [D, D]."""

    mean: Tensor
    covariance: Tensor


def moments(x: Tensor) -> Moments:
    """Mean and unbiased covariance of features [N, D]. Raises ValueError where N < 2."""
    if len(x) < 2:
        raise ValueError(f"features: got {len(x)}; a covariance takes at least 2, so draw more pictures")
    x = x.double()
    mean = x.mean(0)
    return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def frechet_distance(p: Moments, q: Moments) -> float:
    """`|m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p^1/2 C_q C_p^1/2)^1/2)` (Heusel et al., arXiv:1706.08500, eq. 6).

    The root is symmetric, so that covariances of deficient rank (N <= D) give no complex numbers. A few samples in many dimensions
    still bias the distance upwards: keep only the principal components that the samples can fill (`principal_components`).
    """
    root = _root(p.covariance)
    overlap = torch.linalg.eigvalsh(root @ q.covariance @ root).clamp(min=0).sqrt().sum()
    return float((p.mean - q.mean).square().sum() + p.covariance.trace() + q.covariance.trace() - 2 * overlap)


def paired_distance(x: Tensor, reference: Tensor) -> float:
    """`mean |x_i - r_i| / mean |r_i|` of features [N, D] that belong together, two pictures of one prompt: 0 where all are the same."""
    x, reference = x.double(), reference.double()
    return float((x - reference).norm(dim=1).mean() / reference.norm(dim=1).mean())


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy under `(a . b / D + 1)^3`, the unbiased estimate of KID (Binkowski et al., arXiv:1801.01401).

    x [N, D], y [M, D]. Zero in expectation where both come from one distribution, whatever N and M are; it can be negative.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    x, y = x.double(), y.double()
    return float(_mean_of_pairs(kernel(x, x)) + _mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean())


def _mean_of_pairs(table: Tensor) -> Tensor:
    """Mean over i != j."""
    n = len(table)
    return (table.sum() - table.trace()) / (n * (n - 1))


@dataclass(frozen=True)
class PrincipalComponents:
    """An orthonormal basis [D, K] of the directions of largest variance, largest first, around `mean` [D]; `variance` [K] along them."""

    mean: Tensor
    basis: Tensor
    variance: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates [N, K] of features [N, D]."""
        return (x - self.mean) @ self.basis


def principal_components(x: Tensor, components: int) -> PrincipalComponents:
    """Fit to features [N, D]. Raises ValueError where they cannot have that many components."""
    if not 1 <= components <= min(len(x) - 1, x.shape[1]):
        raise ValueError(
            f"components: got {components}; {len(x)} features of width {x.shape[1]} have 1..{min(len(x) - 1, x.shape[1])}"
        )
    x = x.double()
    mean = x.mean(0)
    _, singular, rows = torch.linalg.svd(x - mean, full_matrices=False)
    return PrincipalComponents(mean, rows[:components].T, singular[:components].square() / (len(x) - 1))
