"""Prediction types as linear combinations of data and noise.

Every network output is `m = a x0 + b eps`. One 2x2 solve serves every prediction type.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .schedule import expand

Row = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (alpha, sigma) -> (a, b)


class Split(NamedTuple):
    """Clean estimate and noise of a state.

    `x_t = alpha x0 + sigma eps`. Both are [B, ...].
    """

    x0: Tensor
    eps: Tensor


def edm_row(sigma_data: float = 0.5, sign: float = 1.0) -> Row:
    """Return the row of EDM's raw network output.

    The raw output is F in `D = c_skip x + c_out F` with alpha = 1 (EDM, tab. 1). With `sign` -1 the network
    outputs -F, which is diffusers' v-prediction of EDM.
    """

    def row(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sign * sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out

    return row


def edm_inputs(x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return EDM's network inputs `(c_in x, c_noise)`.

    `c_in = 1 / sqrt(sigma^2 + sigma_data^2)` and `c_noise = log(sigma) / 4` (EDM, tab. 1). The network of
    `edm_row` is evaluated at these inputs.

    x [B, ...]; sigma [B] > 0, float64.
    """
    return expand((sigma**2 + sigma_data**2).rsqrt(), x) * x, sigma.log() / 4


ROWS: dict[str, Row] = {
    "x0": lambda alpha, sigma: (alpha * 0 + 1, sigma * 0),
    "eps": lambda alpha, sigma: (alpha * 0, sigma * 0 + 1),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (alpha * 0 - 1, sigma * 0 + 1),
    "edm": edm_row(),
}


def row_named(name: str, sigma_data: float = 0.5) -> Row:
    """Return the row of a prediction type.

    `sigma_data` is used by `edm` alone. Raises ValueError that lists the known types for an unknown name.
    """
    if not isinstance(name, str) or name not in ROWS:
        raise ValueError(
            f"prediction: got {name!r}, allowed are {', '.join(ROWS)}; take the one that the network was trained with"
        )
    return edm_row(sigma_data) if name == "edm" else ROWS[name]


def split(m: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, row: Row) -> Split:
    """Solve for the clean estimate and the noise of a state.

    Solves `{alpha x0 + sigma eps = x, a x0 + b eps = m}`. m, x [B, ...]; alpha, sigma are broadcastable to m
    and x.

    At sigma = 0 an `eps` row has no information about x0 beyond x, and the solve returns x0 = x.
    """
    a, b = row(alpha, sigma)
    det = alpha * b - sigma * a
    return Split(x0=(b * x - sigma * m) / det, eps=(alpha * m - a * x) / det)


def share(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Return how strongly an output determines the clean estimate.

    Returns `|alpha b - sigma a|`: the error of x0 is the error of m times sigma over this value. The value is
    0 where m and x together contain no information about the data, as for eps at pure noise.
    """
    a, b = row(alpha, sigma)
    return (alpha * b - sigma * a).abs()


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Return the network's regression target `a x0 + b eps`."""
    a, b = row(alpha, sigma)
    return a * x0 + b * eps
