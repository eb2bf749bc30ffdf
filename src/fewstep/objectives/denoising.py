"""Denoising regression of a score, and what weighs or steadies it.

TDM eq. 7 without the density ratio. The ratio is of densities in d dimensions: on average
`log q(x_tau | x0) / q(x_tau | x_t) = -d log(sigma_tau / beta)`, and no float can represent the ratio; to the power 1/d
it can.
"""

from torch import Tensor

from ..core.schedule import Schedule, expand, transition


def denoising(pred_x0: Tensor, target_x0: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted denoising loss per sample.

    `weight * mean_pixels (pred - target)^2`. pred_x0 [B, ...] carries the gradient; target_x0 [B, ...] and
    weight [B] are constants; returns [B].
    """
    return weight.detach().to(pred_x0) * (pred_x0 - target_x0.detach()).square().flatten(1).mean(1)


def transition_target(
    schedule: Schedule, x_t: Tensor, noise: Tensor, t: Tensor, tau: Tensor, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return the exact regression target of the score at x_tau.

    Returns the target and the target's weight, `(f*, (beta/sigma_tau)^2)`, for `x_tau = r x_t + beta e`.

    The score of a diffused sample is `-E[e | x_tau]/beta`, so in x0 form
    `f* = (x_tau - sigma_tau^2/beta e)/alpha_tau`, which equals `(x_t - r sigma_t^2/beta e)/alpha_t` and also
    holds at pure noise. The target is unbiased for any distribution of x_t; TDM's clean target is exact only
    where `x_t | x0_hat ~ q`. The variance of f* grows as 1/beta^2, hence the weight, which is zero where
    `beta/sigma_tau < floor`.

    x_t, noise e [B, ...]; t, tau [B] with tau > t and alpha_t > 0.
    """
    r, beta = transition(schedule, t, tau)
    usable = beta / schedule.sigma(tau) >= floor
    scale = r * schedule.sigma(t) ** 2 / beta.clamp(min=1e-12)
    f_star = (x_t - expand(scale, x_t) * noise) / expand(schedule.alpha(t), x_t)
    weight = usable * (beta / schedule.sigma(tau)) ** 2
    return f_star.where(expand(usable, x_t).bool(), x_t), weight


def density_ratio(schedule: Schedule, x_tau: Tensor, x0: Tensor, noise: Tensor, t: Tensor, tau: Tensor) -> Tensor:
    """Return eq. 7's density ratio to the power 1/d.

    `(q(x_tau | x0) / q(x_tau | x_t))^(1/d)` of `x_tau = r x_t + beta noise`; 1 where x_t is clean, near 0 where tau is
    near t. States [B, ...]; t, tau [B]; returns [B], without gradient.

    Source: TDM eq. 7; the power is that of public code.
    """
    _, beta = transition(schedule, t, tau)
    alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
    error = (x_tau - expand(alpha, x_tau) * x0).detach().double().square().flatten(1).mean(1)
    exponent = noise.double().square().flatten(1).mean(1) / 2 - error / (2 * sigma**2)
    return (beta / sigma) * exponent.exp()


def martingale(h: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return how far a score is from the mean of its successors.

    `mean_pixels (h - h_1)(h - h_2)`, an unbiased estimate of `||h - E h_s||^2`: h [B, ...] is the clean estimate at a
    state, h_1 and h_2 those at two independent draws of a cleaner state from there. An exact score has 0; single
    estimates may be negative. Returns [B].

    Source: arXiv 2302.09057; as a term of a fake score: AC-DMD, arXiv 2605.26108.
    """
    return ((h - first) * (h - second)).flatten(1).mean(1)
