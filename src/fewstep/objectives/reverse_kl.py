"""Reverse KL between diffused student and teacher, as a surrogate loss.

The surrogate's gradient on the student's sample is the gradient of `KL(student || teacher)` at a diffused
state (TDM eq. 6, 11, 12).

In x0 space the score difference is `s_psi - s_phi = (alpha/sigma^2)(f_psi - f_phi)`. The factor in front of
the bracket belongs to the free weight lambda_tau, so every loss takes `delta = f_psi - f_phi` and pulls x
towards `x - delta`.
"""

from collections.abc import Callable

from torch import Tensor

from ..core.schedule import expand
from .matched_state import MatchedState

SurrogateLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, delta, normaliser [B]) -> [B]


def l2(x: Tensor, delta: Tensor, normaliser: Tensor) -> Tensor:
    """Return the normalised square loss per sample.

    `||x - sg(x - delta/n)||^2 / 2`: eq. 6 with DMD's normaliser n (TDM app. F). The gradient on x is delta/n.

    x [B, ...] carries the gradient; delta [B, ...] and normaliser [B] are constants; returns [B].
    """
    goal = (x - delta / expand(normaliser, x)).detach()
    return 0.5 * (x - goal).square().flatten(1).sum(1)


def huber(x: Tensor, delta: Tensor, normaliser: Tensor, c: float = 0.00054) -> Tensor:
    """Return the pseudo-Huber loss per sample, without normaliser.

    `sqrt(||x - sg(x - delta)||^2 + c^2 d) - c sqrt(d)` (eq. 11). The normaliser is unused: the gradient has
    norm <= 1.
    """
    square = (x - (x - delta).detach()).square().flatten(1).sum(1)
    offset = c * x[0].numel() ** 0.5
    return (square + offset**2).sqrt() - offset


def huber_elementwise(x: Tensor, delta: Tensor, normaliser: Tensor, c: float = 1e-3) -> Tensor:
    """Return the element-wise pseudo-Huber loss of delta/n per sample.

    The loss is summed over elements; the gradient of each element is at most 1.
    """
    square = (x - (x - delta / expand(normaliser, x)).detach()).square()
    return ((square + c**2).sqrt() - c).flatten(1).sum(1)


SURROGATE_LOSSES: dict[str, SurrogateLoss] = {
    "l2": l2,
    "huber": huber,
    "huber-elementwise": huber_elementwise,
}


def reverse_kl_loss(state: MatchedState, loss: str, correction: float) -> Tensor:
    """Return the surrogate loss of the reverse KL per sample.

    Returns [B] (eq. 6, 11). `correction` is unused.
    """
    delta = (state.f_fake - state.f_teacher).detach()
    return SURROGATE_LOSSES[loss](state.x, delta, dmd_normaliser(state.x0.detach(), state.f_teacher.detach()))


def dmd_normaliser(x0: Tensor, f_teacher: Tensor) -> Tensor:
    """Return DMD's normaliser `mean |x0_hat - f_phi(x_tau)|` per sample.

    Returns [B] (DMD eq. 8). The normaliser is small where the teacher already agrees with the student.
    """
    return (x0 - f_teacher).abs().flatten(1).mean(1).clamp(min=1e-6).detach()
