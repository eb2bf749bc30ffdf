"""Inputs of a divergence between student and teacher."""

from typing import NamedTuple

from torch import Tensor

from ..core.schedule import Schedule


class MatchedState(NamedTuple):
    """A matched state with both scores at x_tau.

    `x_tau = r x + beta noise`. States are [B, ...], times [B]. `x` and `x0` carry the student's gradient; the
    scores carry a gradient if the divergence requires one.
    """

    schedule: Schedule
    x: Tensor  # the matched state
    x0: Tensor  # the student's clean estimate
    noise: Tensor
    t: Tensor  # time of x
    tau: Tensor
    f_teacher: Tensor  # clean estimate of the guided teacher at x_tau
    f_fake: Tensor  # clean estimate of the fake score at x_tau
