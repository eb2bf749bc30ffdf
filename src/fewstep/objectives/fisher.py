"""Fisher divergence between diffused student and teacher.

The divergence is `E ||s_psi - s_phi||^2`, in score-identity form. Sources: TDM tab. 8; SiD (arXiv
2404.04057).
"""

from torch import Tensor

from ..core.schedule import expand
from .denoising import transition_target
from .matched_state import MatchedState
from .reverse_kl import dmd_normaliser


def fisher(f_teacher: Tensor, f_fake: Tensor, f_cond: Tensor, normaliser: Tensor, correction: float = 0.5) -> Tensor:
    """Return the Fisher divergence per sample, in x0 space.

    `(<d, f_phi - f_cond> - c ||d||^2)/n` with `d = f_phi - f_psi`. All estimates are at x_tau and carry
    gradients through x_tau.

    `f_cond` is the clean estimate of the transition alone, `(x_tau + sigma^2 grad log q(x_tau | x_m))/alpha`
    (see `transition_target`). The mean of `f_cond` given x_tau is the student's true f_psi, so the first term
    has the value of the divergence. Holding a function u fixed in `max_u E 2<u, f_phi - f_cond> - ||u||^2`
    shows that c = 1/2 gives half of the divergence's exact gradient, although f_psi is held fixed. SiD's
    images prefer c of 1 or 1.2.

    f_* [B, ...]; normaliser [B], a constant (the divergence is in x0 space, where the weight over time is
    free); returns [B].
    """
    d = f_teacher - f_fake
    value = (d * (f_teacher - f_cond)).flatten(1).sum(1) - correction * d.square().flatten(1).sum(1)
    return value / expand(normaliser.detach(), value)


def fisher_loss(state: MatchedState, loss: str, correction: float) -> Tensor:
    """Return the weighted Fisher divergence per sample.

    Returns [B] (tab. 8). The Fisher divergence has no surrogate `loss`, so that argument is unused. Both
    estimates carry the gradient of the x_tau at which they were made.
    """
    f_cond, weight = transition_target(state.schedule, state.x, state.noise, state.t, state.tau)
    normaliser = dmd_normaliser(state.x0.detach(), state.f_teacher.detach())
    value = fisher(state.f_teacher, state.f_fake, f_cond, normaliser, correction)
    return weight.to(value) * value
