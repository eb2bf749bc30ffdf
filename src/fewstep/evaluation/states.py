"""Distances between two sets of plain states.

For models without images. Distances are computed in float64 and returned as plain numbers.
"""

import torch
from torch import Tensor

CELLS = 8  # regions into which a teacher's states are divided
SURE = 4.0  # standard errors beyond which a difference of shares is no chance: 1 in 16,000


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the energy distance between two sets of states.

    `2 E|a - b| - E|a - a'| - E|b - b'|` (Szekely and Rizzo 2013). x [N, ...], y [M, ...], with the same shape
    of a state; norms are Euclidean over all elements. The distance is zero in expectation for one
    distribution and can be negative.
    """
    a, b = x.double().flatten(1), y.double().flatten(1)
    return float(2 * torch.cdist(a, b).mean() - _of_pairs(torch.cdist(a, a)) - _of_pairs(torch.cdist(b, b)))


def energy_noise(x: Tensor, y: Tensor, draws: int = 20, seed: int = 0) -> float:
    """Return the largest energy distance that chance explains.

    The distance is the maximum over `draws` random divisions of both sets together.
    """
    both, rng = torch.cat([x, y]).double().flatten(1), torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(both), generator=rng) for _ in range(draws)]
    return max(energy_distance(both[o[: len(x)]], both[o[len(x) :]]) for o in orders)


def _of_pairs(table: Tensor) -> Tensor:
    """Return the mean over i != j.

    The diagonal is zero.
    """
    n = len(table)
    return table.sum() / (n * (n - 1))


def spread(x: Tensor) -> float:
    """Return the root of the mean variance of elements.

    x [N, ...]. The value says how far states are from the mean.
    """
    return float(x.double().flatten(1).var(0).mean().sqrt())


def cells(x: Tensor, count: int = CELLS, rounds: int = 10) -> Tensor:
    """Return the centres [count, D] of regions of x [N, ...].

    k-means, deterministic: the initial centres are points far from each other.
    """
    flat = x.double().flatten(1)
    chosen = [int((flat - flat.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < min(count, len(flat)):
        chosen.append(int(torch.cdist(flat, flat[chosen]).amin(1).argmax()))
    centres = flat[chosen]
    for _ in range(rounds):
        nearest = torch.cdist(flat, centres).argmin(1)
        centres = torch.stack(
            [flat[nearest == k].mean(0) if bool((nearest == k).any()) else c for k, c in enumerate(centres)]
        )
    return centres


def shares(x: Tensor, centres: Tensor) -> Tensor:
    """Return the share of states in the region of each centre.

    x [N, ...], centres [count, D]; returns [count], float64.
    """
    nearest = torch.cdist(x.double().flatten(1), centres).argmin(1)
    return torch.bincount(nearest, minlength=len(centres)).double() / len(x)


def shifted(own: Tensor, other: Tensor, n: int) -> tuple[float, float] | None:
    """Return the shares of the region in which two sets differ most.

    Returns (share, share of the other) for two sets of n, or None if the difference may be chance.
    """
    pooled = (own + other) / 2
    apart = (own - other).abs() / (2 * pooled * (1 - pooled) / n).sqrt().clamp(min=1e-12)
    worst = int(torch.where(own == other, torch.zeros_like(apart), apart).argmax())
    return (
        (float(own[worst]), float(other[worst]))
        if float(apart[worst]) > SURE and float(own[worst]) != float(other[worst])
        else None
    )
