"""Learning a score by regression: two targets for the fake score, one loss. TDM eq. 7."""

from torch import Tensor

from ..core.schedule import Schedule, expand, transition


def denoising(pred_x0: Tensor, target_x0: Tensor, weight: Tensor) -> Tensor:
    """`mean_B weight * mean_pixels (pred - target)^2`. pred_x0, target_x0 [B, ...]; weight [B]; scalar."""
    return (weight.to(pred_x0) * (pred_x0 - target_x0).square().flatten(1).mean(1)).mean()


def transition_target(
    schedule: Schedule, x_tau: Tensor, noise: Tensor, t: Tensor, tau: Tensor, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Exact regression target for the score of `x_tau = r x_t + beta e`, and its weight: `(f*, (beta/sigma_tau)^2)`.

    The score of a diffused sample is `-E[e | x_tau]/beta`, so in x0 form `f* = (x_tau - sigma_tau^2/beta e)/alpha_tau`.
    It is unbiased whatever the law of x_t (TDM's clean target is exact only where `x_t | x0_hat ~ q`), its variance grows as
    1/beta^2, hence the weight, zero where `beta/sigma_tau < floor`.

    x_tau, noise [B, ...]; t, tau [B] with tau > t. Where alpha_tau = 0 the x0 form has no meaning: alpha_tau is floored.
    """
    _, beta = transition(schedule, t, tau)
    sigma, alpha = schedule.sigma(tau), schedule.alpha(tau).clamp(min=1e-2)
    usable = beta / sigma >= floor
    scale = sigma**2 / beta.clamp(min=1e-12)
    f_star = (x_tau - expand(scale, x_tau) * noise) / expand(alpha, x_tau)
    weight = usable * (beta / sigma) ** 2
    return f_star.where(expand(usable, x_tau).bool(), x_tau), weight
