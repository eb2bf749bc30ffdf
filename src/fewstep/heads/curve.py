"""The common shape of sampling trajectories.

The shape is three coordinates as functions of time, fitted once for all step counts. TrajP-L fits each
coordinate by the sum of a quadratic polynomial, an exponential and a Gamma term (method.md 3.2).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TERMS = 5  # 1, s, s^2, e^(k s), s^p e^(-q s)
RIDGE = 1e-10  # resolves terms that are nearly the same function


@dataclass(frozen=True)
class Curve:
    """Three coordinates of a trajectory as functions of time.

    `c(s) = a0 + a1 s + a2 s^2 + b e^(k s) + g s^p e^(-q s)` per coordinate; s is 0 at pure noise and 1 at
    clean data. The exponential and the Gamma term are scaled as in `basis`.

    `weights` [3, 5] are (a0, a1, a2, b, g), `shape` [3, 3] are (k, p, q), and `r2` [3] is the share of the
    variance that each fit explains.
    """

    weights: Tensor
    shape: Tensor
    r2: Tensor

    def at(self, s: Tensor) -> Tensor:
        """Return the coordinates [B, 3] at s [B].

        float64.
        """
        fits = zip(self.weights.to(s.device), self.shape.to(s.device), strict=True)
        return torch.stack([basis(s.double(), shape) @ w for w, shape in fits], 1)

    @cached_property
    def size(self) -> Tensor:
        """Largest absolute value [3] of each coordinate along the curve."""
        return self.at(torch.linspace(0, 1, 201)).abs().amax(0)


def basis(s: Tensor, shape: Tensor) -> Tensor:
    """Return the five terms of the curve.

    Returns [..., J, 5] at s [J] for shapes (k, p, q) [..., 3]. The last two terms are divided by their
    largest value.
    """
    k, p, q = (shape[..., i, None] for i in range(3))
    one = torch.ones_like(s) * torch.ones_like(k)
    rise = torch.exp(k * s - k.clamp(min=0))
    gamma = torch.exp(p * torch.log(s.clamp(min=1e-12) * q / p) - q * s + p)
    return torch.stack([one, one * s, one * s**2, rise, gamma], -1)


def own_coordinates(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return each trajectory's coordinates in the trajectory's own basis.

    Returns `(c [n, J, 3], left [n, 3])` for trajectories [n, J, D] from noise (first) to data (last).

    Per sample, the first coordinate lies along x_T - x_0. The other two lie along the two leading principal
    directions of the part orthogonal to x_T - x_0, with signs such that the largest excursion is positive.
    Units are ||x_T - x_0||.

    `left` is the share of the orthogonal part (in squared norm) that one, two and three principal directions
    leave unexplained. The share refers to the orthogonal part because a single principal direction explains
    almost all of a raw trajectory.
    """
    x = states.double()
    span = x[:, 0] - x[:, -1]
    length = span.norm(dim=1)
    e1 = span / length[:, None]
    apart = x - x[:, -1:]
    u = torch.einsum("njd,nd->nj", apart, e1)
    rest = apart - u[..., None] * e1[:, None]
    _, values, directions = torch.linalg.svd(rest, full_matrices=False)
    found = torch.einsum("njd,ned->nje", rest, directions[:, :2])
    turned = torch.gather(found, 1, found.abs().argmax(1, keepdim=True)).sign()
    energy = values.square()
    left = 1 - energy.cumsum(1)[:, :3] / energy.sum(1, keepdim=True).clamp(min=1e-300)
    return torch.cat([u[..., None], found * turned], 2) / length[:, None, None], left


def coordinates(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean coordinates, and the unexplained share per sample.

    Returns `own_coordinates` averaged over samples, [J, 3], and the share of each sample that two principal
    directions leave unexplained, [n].
    """
    c, left = own_coordinates(states)
    return c.mean(0), left[:, 1]


def fit_curve(s: Tensor, c: Tensor, starts: int = 16) -> Curve:
    """Fit a curve to coordinates by least squares.

    The linear terms are solved in closed form inside a descent over (k, p, q), which starts from the best
    points of a grid. s [J], c [J, 3].
    """
    fits = [_fit(s.double(), y, starts) for y in c.double().unbind(1)]
    return Curve(*(torch.stack(parts) for parts in zip(*fits, strict=True)))


def _fit(s: Tensor, y: Tensor, starts: int) -> tuple[Tensor, Tensor, Tensor]:
    spread = (y - y.mean()).square().sum().clamp(min=1e-300)
    rates = torch.logspace(-1, 1.7, 10).double()
    # Grid of the Gamma term over the peak p/q and the width sqrt(p)/q.
    peak, width = torch.meshgrid(
        torch.linspace(0.05, 1.2, 14).double(), torch.logspace(-1.7, 0.3, 10).double(), indexing="ij"
    )
    p = (peak / width).square().flatten()
    gammas = torch.stack([p, p / peak.flatten()], 1).clamp(0.05, 500)
    grid = torch.cat([torch.cat([k.expand(len(gammas), 1), gammas], 1) for k in torch.cat([-rates, rates])])
    best = grid[_misfit(s, y, grid).argsort()[:starts]]
    free = torch.cat([best[:, :1], best[:, 1:].log()], 1).requires_grad_()
    descent = torch.optim.LBFGS(
        [free], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-15, tolerance_grad=1e-12
    )

    def shapes() -> Tensor:
        return torch.cat([free[:, :1].clamp(-60, 60), free[:, 1:].clamp(-3, 6.5).exp()], 1)

    def closure() -> Tensor:
        descent.zero_grad()
        total = (_misfit(s, y, shapes()) / spread).sum()
        total.backward()
        return total

    with torch.enable_grad():
        descent.step(closure)
    found = shapes().detach()
    shape = found[_misfit(s, y, found).nan_to_num(torch.inf).argmin()]
    a = basis(s, shape)
    weights = torch.linalg.solve(a.T @ a + RIDGE * torch.eye(TERMS).double(), a.T @ y)
    return weights, shape, 1 - (a @ weights - y).square().sum() / spread


def _misfit(s: Tensor, y: Tensor, shapes: Tensor) -> Tensor:
    """Return the squared error [N] of the best linear terms per shape."""
    a = basis(s, shapes)
    weights = torch.linalg.solve(a.mT @ a + RIDGE * torch.eye(TERMS).double(), a.mT @ y)
    return ((a @ weights[..., None])[..., 0] - y).square().sum(-1)
