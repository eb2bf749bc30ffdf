"""Learning a score by regression: two targets for the fake score, one loss. TDM eq. 7, without its density ratio.

That ratio is of densities in d dimensions, `log q(x_tau | x0) / q(x_tau | x_t) = -d log(sigma_tau / beta)` on average: no float holds it.
"""

from torch import Tensor

from ..core.schedule import Schedule, expand, transition


def denoising(pred_x0: Tensor, target_x0: Tensor, weight: Tensor) -> Tensor:
    """`weight * mean_pixels (pred - target)^2` per sample. pred_x0 [B, ...] carries the gradient; target_x0 [B, ...] and weight [B] are constants; returns [B]."""
    return weight.detach().to(pred_x0) * (pred_x0 - target_x0.detach()).square().flatten(1).mean(1)


def transition_target(
    schedule: Schedule, x_t: Tensor, noise: Tensor, t: Tensor, tau: Tensor, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Exact regression target for the score of `x_tau = r x_t + beta e`, and its weight: `(f*, (beta/sigma_tau)^2)`.

    The score of a diffused sample is `-E[e | x_tau]/beta`, so in x0 form `f* = (x_tau - sigma_tau^2/beta e)/alpha_tau`, which is
    `(x_t - r sigma_t^2/beta e)/alpha_t`: it holds at pure noise too. It is unbiased whatever the law of x_t (TDM's clean target
    is exact only where `x_t | x0_hat ~ q`), its variance grows as 1/beta^2, hence the weight, zero where `beta/sigma_tau < floor`.

    x_t, noise e [B, ...]; t, tau [B] with tau > t and alpha_t > 0.
    """
    r, beta = transition(schedule, t, tau)
    usable = beta / schedule.sigma(tau) >= floor
    scale = r * schedule.sigma(t) ** 2 / beta.clamp(min=1e-12)
    f_star = (x_t - expand(scale, x_t) * noise) / expand(schedule.alpha(t), x_t)
    weight = usable * (beta / schedule.sigma(tau)) ** 2
    return f_star.where(expand(usable, x_t).bool(), x_t), weight
