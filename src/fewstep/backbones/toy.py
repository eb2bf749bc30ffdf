"""Toy data in closed form.

The exact denoiser and score, and a Gaussian's probability flow, are known at every time and in any dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.prediction import Split
from ..core.schedule import Schedule, expand


@dataclass(frozen=True)
class Gaussian:
    """Data `N(mean, diag(var))`.

    mean, var [D], float64.
    """

    mean: Tensor
    var: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample n points [n, D]."""
        return self.mean + self.var.sqrt() * torch.randn(
            (n, len(self.mean)), generator=generator, dtype=self.mean.dtype
        )

    def denoise(self, schedule: Schedule, x: Tensor, t: Tensor) -> Split:
        """Return `E[x0 | x_t]` and the matching noise."""
        a, s = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        x0 = self.mean + self.var * a / (a**2 * self.var + s**2) * (x - a * self.mean)
        return Split(x0, (x - a * x0) / s)

    def flow(self, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Map states exactly along the probability flow from t to s.

        Each coordinate keeps its number of standard deviations.
        """
        a, b, c, d = (expand(f(u), x) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
        return c * self.mean + (x - a * self.mean) * ((c**2 * self.var + d**2) / (a**2 * self.var + b**2)).sqrt()


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians `N(means_k, std^2 I)` with equal weights.

    means [M, D].
    """

    means: Tensor
    std: float

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample n points [n, D]."""
        k = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[k] + self.std * torch.randn(
            (n, self.means.shape[1]), generator=generator, dtype=self.means.dtype
        )

    def denoise(self, schedule: Schedule, x: Tensor, t: Tensor) -> Split:
        """Return `E[x0 | x_t]` and the matching noise.

        Responsibilities times each component's own denoiser.
        """
        a, s = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        total = a**2 * self.std**2 + s**2
        apart = x[:, None] - a[:, None] * self.means
        weight = torch.softmax(-0.5 * apart.square().sum(2) / total, dim=1)
        own = self.means + (self.std**2 * a / total)[:, None] * apart
        x0 = (weight[..., None] * own).sum(1)
        return Split(x0, (x - a * x0) / s)

    @staticmethod
    def ring(modes: int = 8, radius: float = 0.7, std: float = 0.06) -> "Mixture":
        """Return a mixture with modes spaced evenly on a circle."""
        angle = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
        return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)
