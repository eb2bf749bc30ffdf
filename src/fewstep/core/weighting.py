"""Weights over time for regressions on x0."""

from collections.abc import Callable

from torch import Tensor

from .prediction import Row
from .schedule import Schedule


def own_output(schedule: Schedule, row: Row, t: Tensor, clip: float = 5.0) -> Tensor:
    """Weigh errors of x0 as errors of the network's own output.

    At a state x_t, an error dm of the output `m = a x0 + b eps` is an error `dx0 = -(sigma / det) dm` of the
    clean estimate, with `det = alpha b - sigma a`. The weight `(det / sigma)^2` converts the squared error of
    x0 into the squared error of m: `1` for x0, SNR for eps, SNR + 1 for v on a variance-preserving table,
    `1 / sigma^2` for flow, `1 / c_out^2` for EDM.

    The weight is clipped as in min-SNR: `min((det / sigma)^2, clip)`. t [B]; returns [B], float64.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = row(alpha, sigma)
    return ((alpha * b - sigma * a) / sigma).square().clamp(max=clip)


def min_snr(schedule: Schedule, row: Row, t: Tensor, clip: float = 5.0) -> Tensor:
    """Weigh errors of x0 by the clipped signal-to-noise ratio.

    The weight is `min(alpha^2/sigma^2, clip)` (arXiv 2303.09556). Without the clip, low noise dominates x0
    regression. t [B]; returns [B], float64.
    """
    return (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2).clamp(max=clip)


def truncated_v(schedule: Schedule, row: Row, t: Tensor, clip: float = 5.0) -> Tensor:
    """Weigh errors of x0 as the v-prediction loss does.

    The weight is `min(alpha^2/sigma^2 + 1, clip)`, whatever the network predicts. Unlike min-SNR, the weight
    does not vanish at zero terminal SNR, where a few-step student takes the first step. A network that
    predicts eps sees the errors at the noisiest times weighted by `1 / alpha^2`, in the hundreds. t [B];
    returns [B], float64.
    """
    return (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2 + 1).clamp(max=clip)


Weighting = Callable[[Schedule, Row, Tensor, float], Tensor]
WEIGHTINGS: dict[str, Weighting] = {"own": own_output, "min-snr": min_snr, "v": truncated_v}
