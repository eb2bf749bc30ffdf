"""Every network output is linear in data and noise, `m = a x0 + b eps`: one 2x2 solve serves every prediction type."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .schedule import expand

Row = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (alpha, sigma) -> (a, b)


class Split(NamedTuple):
    """A state taken apart: `x_t = alpha x0 + sigma eps`. Both [B, ...]."""

    x0: Tensor
    eps: Tensor


def edm_row(sigma_data: float = 0.5, sign: float = 1.0) -> Row:
    """Raw F of `D = c_skip x + c_out F` with alpha = 1 (EDM, tab. 1). `sign` -1: the network says -F, diffusers' v-prediction of EDM."""

    def row(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sign * sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (1 - c_skip) / c_out, -c_skip * sigma / c_out

    return row


def edm_inputs(x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """`(c_in x, c_noise)`, at which F of `edm_row` is asked: `c_in = 1 / sqrt(sigma^2 + sigma_data^2)`, `c_noise = log(sigma) / 4` (EDM, tab. 1).

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
    """The row of a prediction type; `sigma_data` is that of `edm`. Raises ValueError listing the known ones."""
    if not isinstance(name, str) or name not in ROWS:
        raise ValueError(f"prediction: got {name!r}, allowed are {', '.join(ROWS)}; take the one that the network was trained with")
    return edm_row(sigma_data) if name == "edm" else ROWS[name]


def split(m: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, row: Row) -> Split:
    """Solve `{alpha x0 + sigma eps = x, a x0 + b eps = m}`. m, x [B, ...]; alpha, sigma broadcastable to them.

    At sigma = 0 an `eps` row has no information about x0 beyond x itself, and the solve says so: x0 = x.
    """
    a, b = row(alpha, sigma)
    det = alpha * b - sigma * a
    return Split(x0=(b * x - sigma * m) / det, eps=(alpha * m - a * x) / det)


def share(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """`|alpha b - sigma a|`: errors of m are those of x0 times sigma over this. 0 where m and x together say nothing of the data, as eps of pure noise."""
    a, b = row(alpha, sigma)
    return (alpha * b - sigma * a).abs()


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """What a network of this row should output for (x0, eps): `a x0 + b eps`."""
    a, b = row(alpha, sigma)
    return a * x0 + b * eps
