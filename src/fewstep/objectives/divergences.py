"""Divergences between the diffused student and teacher, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .f_divergences import RATIO_WEIGHTS, RatioWeight
from .fisher import fisher_loss
from .matched_state import MatchedState
from .reverse_kl import reverse_kl_loss


@dataclass(frozen=True)
class Divergence:
    """A loss on matched states.

    The loss is `(state, surrogate loss, correction) -> [B]`. With `scores_carry_gradient`, both scores are
    differentiated with respect to x_tau, so the update of the fake score cannot share the forward pass. A divergence
    with a `ratio_weight` weighs samples by the ratio of target to student, which a discriminator knows.
    """

    loss: Callable[[MatchedState, str, float], Tensor]
    scores_carry_gradient: bool
    ratio_weight: RatioWeight | None = None


DIVERGENCES: dict[str, Divergence] = {
    "reverse-kl": Divergence(reverse_kl_loss, scores_carry_gradient=False),
    "fisher": Divergence(fisher_loss, scores_carry_gradient=True),
    **{name: Divergence(reverse_kl_loss, False, ratio_weight=h) for name, h in RATIO_WEIGHTS.items()},
}
