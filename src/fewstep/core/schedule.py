"""Forward process `x_t = alpha(t) x0 + sigma(t) eps` and its transitions.

All times and coefficients are float64.
"""

from dataclasses import dataclass, field
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..config_fields import POSITIVE, Range, check_fields


@runtime_checkable
class Schedule(Protocol):
    """The functions alpha and sigma of time, and the time range.

    `t_clean` is the time of data (alpha 1, sigma 0) and `t_max` the time of pure noise. `resolution` is the
    spacing of the times that a network knows: 1 for a table of integers, 0 for a continuum. `start_std` is
    the standard deviation of the noise that sampling starts from, as in diffusers: 1 for a table, also where
    the table keeps a little signal at t_max.

    `at` is the time at a fraction u of the path from clean data (0) to pure noise (1). Grids are even in u,
    and times are drawn evenly in u. `fraction` is the inverse of `at`.
    """

    @property
    def t_clean(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def resolution(self) -> float: ...
    @property
    def start_std(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def at(self, u: Tensor) -> Tensor: ...
    def fraction(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EDM:
    """EDM's schedule `alpha = 1, sigma = t`.

    Fractions are even in the `rho`-th root of t, from `t_min` (eq. 5). `data_std` is the standard deviation
    of data that the starting noise of sampling contains in addition to the noise: diffusers starts as if
    `data_std` were 1.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """

    t_max: Annotated[float, POSITIVE] = 80.0
    t_clean: Annotated[float, Range()] = 0.0
    resolution: Annotated[float, Range(0)] = 0.0
    t_min: Annotated[float, POSITIVE] = 0.002
    rho: Annotated[float, POSITIVE] = 7.0
    data_std: Annotated[float, Range(0)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if not self.t_min < self.t_max:
            raise ValueError(f"schedule.t_min: got {self.t_min:g}, allowed are numbers below t_max ({self.t_max:g})")

    @property
    def start_std(self) -> float:
        return (self.t_max**2 + self.data_std**2) ** 0.5

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def at(self, u: Tensor) -> Tensor:
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        t = (low + u.double() * (high - low)) ** self.rho
        # Set the ends exactly: the root and the power round, and no time may exceed t_max.
        return torch.where(u > 0, torch.where(u < 1, t, self.t_max), self.t_clean)

    def fraction(self, t: Tensor) -> Tensor:
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return ((t.double().clamp(min=0) ** (1 / self.rho) - low) / (high - low)).clamp(min=0)


@dataclass(frozen=True)
class Flow:
    """Rectified flow `alpha = 1 - t, sigma = t`.

    With a `shift` s, the fraction u is the time `s u / (1 + (s - 1) u)`: more times lie near noise (arXiv
    2403.03206, eq. 23).

    Source: arXiv 2209.03003.
    """

    t_max: Annotated[float, Range(0, 1, above=True)] = 1.0
    t_clean: Annotated[float, Range()] = 0.0
    resolution: Annotated[float, Range(0)] = 0.0
    shift: Annotated[float, POSITIVE] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "schedule")

    @property
    def start_std(self) -> float:
        return self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def at(self, u: Tensor) -> Tensor:
        return self.t_max * self.shift * u.double() / (1 + (self.shift - 1) * u.double())

    def fraction(self, t: Tensor) -> Tensor:
        way = t.double() / self.t_max
        return way / (self.shift - (self.shift - 1) * way)


@dataclass(frozen=True)
class VP:
    """Variance-preserving schedule from a table of cumulative products.

    For `alpha_bar [T]`: `alpha = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)`. `t` is an index 0 .. T-1,
    and -1 is clean data, so a K-step grid lands on `T i / K - 1`. Raises ValueError for a table that is not a
    decreasing list of cumulative products.
    """

    alpha_bar: Tensor
    # alpha and sigma [T + 1] from clean data on, by device: a copy to a GPU at every use would stall it.
    _levels: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        """Name the table by its length; a thousand numbers help nobody."""
        return f"VP({len(self.alpha_bar)} times, alpha_bar {self.alpha_bar[0]:.4g} to {self.alpha_bar[-1]:.4g})"

    def __post_init__(self) -> None:
        try:
            table = torch.as_tensor(self.alpha_bar)  # also from numpy arrays and lists
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"schedule: alpha_bar is a {type(self.alpha_bar).__name__}; pass the scheduler's alphas_cumprod"
            ) from error
        object.__setattr__(self, "alpha_bar", table)
        if table.is_complex() or table.ndim != 1 or len(table) < 2 or not bool((table.diff() <= 0).all()):
            raise ValueError(
                "schedule: alpha_bar must be a decreasing list of numbers; pass the scheduler's alphas_cumprod"
            )
        if not (0 <= float(table[-1]) <= 0.5 < float(table[0]) <= 1):
            raise ValueError(
                f"schedule: alpha_bar goes from {float(table[0]):.4g} to {float(table[-1]):.4g}, allowed are "
                "cumulative products from at most 1 to below 0.5; "
                "pass the scheduler's alphas_cumprod, not its alphas"
            )

    @property
    def t_clean(self) -> float:
        return -1.0

    @property
    def t_max(self) -> float:
        return len(self.alpha_bar) - 1.0

    @property
    def resolution(self) -> float:
        return 1.0

    @property
    def start_std(self) -> float:
        return 1.0

    def _level(self, which: int, t: Tensor) -> Tensor:
        held = self._levels.get(t.device)
        if held is None:
            table = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar.double().cpu()])
            held = (table.sqrt().to(t.device), (1 - table).sqrt().to(t.device))
            if not isinstance(held[0], FakeTensor):  # fake tensors end with their mode
                self._levels[t.device] = held
        return held[which][(t + 1).round().long()]

    def alpha(self, t: Tensor) -> Tensor:
        return self._level(0, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._level(1, t)

    def at(self, u: Tensor) -> Tensor:
        return len(self.alpha_bar) * u.double() - 1

    def fraction(self, t: Tensor) -> Tensor:
        return (t.double() + 1) / len(self.alpha_bar)


def expand(a: Tensor, x: Tensor) -> Tensor:
    """Reshape a `[B]` tensor to broadcast against `x [B, ...]`.

    `[B] -> [B, 1, ..., 1]`, in the dtype of x.
    """
    return a.to(x).reshape(a.shape + (1,) * (x.ndim - a.ndim))


def diffuse(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Diffuse clean data to time t.

    `q(x_t | x0)`: `alpha_t x0 + sigma_t eps`. x0, eps [B, ...]; t [B].
    """
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def transition(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the transition from s to t.

    Returns `(r, beta)` of `q(x_t | x_s) = N(r x_s, beta^2)` for t noisier than s: `r = alpha_t/alpha_s`,
    `beta^2 = sigma_t^2 - r^2 sigma_s^2`.

    s, t [B]; float64. `beta` is exactly zero at t = s.
    """
    r = schedule.alpha(t) / schedule.alpha(s)
    return r, (schedule.sigma(t) ** 2 - (r * schedule.sigma(s)) ** 2).clamp(min=0).sqrt()


def posterior(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """Draw a cleaner state between a noisy one and clean data.

    `q(x_s | x_t, x0) = N((r sigma_s^2 x_t + alpha_s beta^2 x0) / sigma_t^2, (sigma_s beta / sigma_t)^2)` with the
    transition's r and beta from s to t. x_t, x0, eps [B, ...]; s, t [B] with s cleaner than t.

    Source: DDPM eq. 6, 7, arXiv 2006.11239, for any schedule.
    """
    (r, beta), sigma_s, sigma_t = transition(schedule, s, t), schedule.sigma(s), schedule.sigma(t)
    noisy, clean = r * (sigma_s / sigma_t) ** 2, schedule.alpha(s) * (beta / sigma_t) ** 2
    return expand(noisy, x_t) * x_t + expand(clean, x_t) * x0 + expand(sigma_s * beta / sigma_t, x_t) * eps
