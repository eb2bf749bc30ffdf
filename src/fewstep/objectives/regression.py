"""Regression of a student's clean estimate on a teacher's target.

Consistency and progressive distillation use these losses and targets.
"""

from collections.abc import Callable

from torch import Tensor

from ..core.schedule import Schedule, expand

RegressionLoss = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) [B, ...] -> [B]


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Return `mean (a - b)^2` per sample."""
    return (prediction - target).square().flatten(1).mean(1)


def mean_absolute(prediction: Tensor, target: Tensor) -> Tensor:
    """Return `mean |a - b|` per sample."""
    return (prediction - target).abs().flatten(1).mean(1)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Return `mean sqrt((a - b)^2 + c^2) - c` per sample.

    Source: LCM's metric, arXiv 2310.04378.
    """
    return ((prediction - target).square() + c**2).sqrt().flatten(1).mean(1) - c


REGRESSION_LOSSES: dict[str, RegressionLoss] = {"l1": mean_absolute, "l2": mean_square, "huber": pseudo_huber}


def consistency_function(
    x: Tensor, x0: Tensor, t: Tensor, clean: float, scaling: float = 10.0, sigma_data: float = 0.5
) -> Tensor:
    """Return the consistency function `c_skip x + c_out x0_hat`.

    The function is the identity on clean data (arXiv 2303.01469, eq. 5), with LCM's scaling of the table's
    times.

    x, x0 [B, ...]; t [B]; `clean` is the time of data.
    """
    s = scaling * (t - clean)
    c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()
    return expand(c_skip, x) * x + expand(c_out, x) * x0


def landing_target(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the clean estimate whose DDIM step lands on x_s.

    The DDIM step goes from x_t at t to x_s at s. x_t, x_s [B, ...]; t, s [B] with s cleaner than t.

    Source: arXiv 2202.00512, app. G.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (x_s - expand(ratio, x_t) * x_t) / expand(schedule.alpha(s) - ratio * schedule.alpha(t), x_t)
