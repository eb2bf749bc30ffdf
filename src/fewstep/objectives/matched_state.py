"""What a divergence between student and teacher is computed from."""

from typing import NamedTuple

from torch import Tensor

from ..core.schedule import Schedule


class MatchedState(NamedTuple):
    """A matched state with both scores at `x_tau = r x + beta noise`. Tensors of states are [B, ...], times [B].

    `x`, `x0` and `x_tau` carry the student's gradient; the scores do where the divergence needs it.
    """

    schedule: Schedule
    x: Tensor  # what is matched
    x0: Tensor  # the student's clean estimate
    noise: Tensor
    t: Tensor  # time of x
    tau: Tensor
    f_teacher: Tensor  # clean estimate of the guided teacher at x_tau
    f_fake: Tensor  # that of the fake score
