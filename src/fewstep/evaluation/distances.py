"""Distances between two sets of feature vectors.

All distances are computed in float64 and returned as plain numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features.

    The Frechet distance uses the Gaussian with these moments.
    """

    mean: Tensor
    covariance: Tensor


def moments(x: Tensor) -> Moments:
    """Return the mean and unbiased covariance of features [N, D].

    float64. Raises ValueError where N < 2.
    """
    if len(x) < 2:
        raise ValueError(f"features: got {len(x)}; a covariance takes at least 2, so sample more images")
    x = x.double()
    mean = x.mean(0)
    return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def frechet_distance(p: Moments, q: Moments) -> float:
    """Return the Frechet distance between two Gaussians.

    `|m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p^1/2 C_q C_p^1/2)^1/2)` (Heusel et al., arXiv:1706.08500, eq. 6).

    The root is symmetric, so covariances of deficient rank (N <= D) give no complex numbers. A few samples in
    many dimensions still bias the distance upwards: keep only as many principal components as the samples can
    estimate (`principal_components`).
    """
    root = _root(p.covariance)
    overlap = torch.linalg.eigvalsh(root @ q.covariance @ root).clamp(min=0).sqrt().sum()
    return float((p.mean - q.mean).square().sum() + p.covariance.trace() + q.covariance.trace() - 2 * overlap)


def paired_distance(x: Tensor, reference: Tensor) -> float:
    """Return the relative distance of features that belong together.

    `mean |x_i - r_i| / mean |r_i|` of features [N, D], for example of two images of one prompt; 0 where all
    pairs are equal.
    """
    x, reference = x.double(), reference.double()
    return float((x - reference).norm(dim=1).mean() / reference.norm(dim=1).mean())


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class KernelReference:
    """Features `x` [N, D] that several sets are compared with.

    `within` is the mean kernel of its own pairs: of thousands of features it takes seconds.
    """

    x: Tensor
    within: Tensor


def kernel_reference(x: Tensor) -> KernelReference:
    """Return features [N, D] as a reference of the kernel distance."""
    x = x.double()
    return KernelReference(x, _mean_of_pairs(_kernel(x, x)))


def kernel_distance(reference: KernelReference, y: Tensor) -> float:
    """Return the unbiased estimate of KID.

    KID is the squared maximum mean discrepancy under `(a . b / D + 1)^3` (Binkowski et al.,
    arXiv:1801.01401), of features y [M, D]. The estimate is zero in expectation where both sets come from one
    distribution, whatever N and M are; the estimate can be negative.
    """
    y = y.double()
    return float(reference.within + _mean_of_pairs(_kernel(y, y)) - 2 * _kernel(reference.x, y).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_of_pairs(table: Tensor) -> Tensor:
    """Return the mean over i != j."""
    n = len(table)
    return (table.sum() - table.trace()) / (n * (n - 1))


@dataclass(frozen=True)
class PrincipalComponents:
    """Directions of largest variance.

    `basis` [D, K] is orthonormal, largest variance first, around `mean` [D]; `variance` [K] is the variance
    along each direction.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the coordinates [N, K] of features [N, D]."""
        return (x - self.mean) @ self.basis


def principal_components(x: Tensor, components: int) -> PrincipalComponents:
    """Fit principal components to features [N, D].

    Raises ValueError if the features cannot have that many components.
    """
    if not 1 <= components <= min(len(x) - 1, x.shape[1]):
        raise ValueError(
            f"components: got {components}; {len(x)} features of width {x.shape[1]} have "
            f"1..{min(len(x) - 1, x.shape[1])}"
        )
    x = x.double()
    mean = x.mean(0)
    _, singular, rows = torch.linalg.svd(x - mean, full_matrices=False)
    return PrincipalComponents(mean, rows[:components].T, singular[:components].square() / (len(x) - 1))
