"""Low-rank parts of a change of weights.

A change is `B A`, or a whole matrix. Its part of rank r is the best one: a truncated singular value decomposition. The
energy of a change is the square of its Frobenius norm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 256  # smaller sides of a matrix up to which all singular values are computed
MORE, ROUNDS = 16, 4  # more directions than wanted, and power iterations, of the randomised decomposition


class Part(NamedTuple):
    """A low-rank part `B A`, and the energies of part and whole.

    B [out, r], A [r, in].
    """

    up: Tensor
    down: Tensor
    kept: float
    whole: float


def of_product(up: Tensor, down: Tensor, rank: int) -> Part:
    """Return the low-rank part of a product.

    up [out, r], down [r, in].
    The factors themselves where their rank is no larger.
    """
    whole = float(((up.T @ up).double() * (down @ down.T).double()).sum())
    if up.shape[1] <= rank:
        return Part(up, down, whole, whole)
    left, a = torch.linalg.qr(up)
    right, b = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(a @ b.T)
    root, kept = s[:rank].sqrt(), float(s[:rank].double().square().sum())
    return Part(left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ right.T, kept, whole)


def of_matrix(change: Tensor, rank: int) -> Part:
    """Return the low-rank part of a matrix [out, in] in float32.

    Randomised for large matrices (arXiv 0909.4061), with the same draws each time.
    """
    whole = float(change.double().square().sum())
    if min(change.shape) <= max(EXACT, rank + MORE):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[change.device] if change.device.type == "cuda" else []):
            torch.manual_seed(0)
            u, s, t = torch.svd_lowrank(change, rank + MORE, ROUNDS)
            v = t.T
    root = s[:rank].sqrt()
    return Part(u[:, :rank] * root, root[:, None] * v[:rank], float(s[:rank].double().square().sum()), whole)
