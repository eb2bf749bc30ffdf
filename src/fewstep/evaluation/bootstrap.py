"""Intervals by bootstrap over prompts, and paired comparisons.

Prompts are drawn with replacement, each with all its images: images of one prompt are not independent.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DRAWS = 200
FEW_DRAWS = 20  # of numbers that take seconds
LEVEL = 0.95
MOSTLY = 0.9  # least share of the draws that have a number, for an interval: few prompts may not be drawn at all
BLOCK = 4  # images of a class that are drawn together, where there are few classes and many images of each
Interval = tuple[float, float]


def draws(sizes: Sequence[int]) -> Iterator[list[Tensor]]:
    """Draw indices of several sets with replacement, `DRAWS` times.

    The draws are the same every time.
    """
    rng = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        yield [torch.randint(size, (size,), generator=rng) for size in sizes]


@dataclass(frozen=True)
class Groups:
    """Images that are drawn together: `rows[g]` are the indices of group g."""

    rows: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def draws(self) -> Tensor:
        """Draw groups with replacement, [`DRAWS`, G]; the same every time."""
        return torch.stack([drawn[0] for drawn in draws([len(self.rows)])])

    def images(self, drawn: Tensor) -> Tensor:
        """Return the indices of all images of these groups."""
        return torch.cat([self.rows[g] for g in drawn.tolist()])

    def among(self, there: Tensor) -> "Groups":
        """Return the groups of the images that are there [n]."""
        return Groups(tuple(rows[there[rows]] for rows in self.rows if bool(there[rows].any())))

    def means(self, values: Tensor) -> Tensor:
        """Return the mean of values [n] within every group, [G]."""
        return torch.stack([values[rows].mean() for rows in self.rows])


def groups_of(prompts: Sequence[str], largest: int = 0) -> Groups:
    """Return the images of each prompt as groups, in order.

    Of more than `largest` images of a prompt, where it is not 0, consecutive blocks of `BLOCK` images are groups: a
    model of few classes is asked for all of them, and chance is in the seeds.
    """
    of: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        of[prompt].append(i)
    found: list[Tensor] = []
    for rows in of.values():
        size = BLOCK if largest and len(rows) > largest else len(rows)
        found += [torch.tensor(rows[i : i + size]) for i in range(0, len(rows), size)]
    return Groups(tuple(found))


def interval(value: float, drawn: Tensor) -> Interval:
    """Return the interval of a value from its values [draws].

    The draws are on drawn prompts. Percentiles around the value: a distance of drawn prompts, some of which are
    drawn twice, is larger on average than that of the prompts themselves, and this difference is taken off.
    """
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn.double() - drawn.double().mean(), torch.tensor([tail, 1 - tail]).double()).tolist()
    return value + min(low, 0.0), value + max(high, 0.0)  # equal draws differ from their mean by rounding


def spread(value: float, drawn: Tensor) -> Interval:
    """Return the interval of a value from a few draws.

    1.96 standard deviations to both sides.
    """
    wide = 1.96 * float(drawn.double().std())
    return value - wide, value + wide


def intervals(
    values: Mapping[str, Any],
    drawn: Iterable[Mapping[str, Any]],
    ends: Callable[[float, Tensor], Interval] = interval,
) -> dict[str, Interval]:
    """Return the interval of every number.

    `drawn` are the numbers on drawn prompts, draw by draw. Numbers that many draws lack have no interval.
    """
    found: dict[str, list[float]] = defaultdict(list)
    several_of = list(drawn)
    for numbers in several_of:
        for key, value in numbers.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[key].append(float(value))
    return {
        key: ends(float(values[key]), torch.tensor(several))
        for key, several in found.items()
        if len(several) >= MOSTLY * len(several_of) and values.get(key) is not None
    }


@dataclass(frozen=True)
class Paired:
    """How two rows compare, image by image.

    Both have the same prompts and noise. `wins` is the share of images at which the row is better; a tie counts
    half. `difference` is the mean of the row's value minus the other's. Both have an interval.
    """

    wins: float
    wins_interval: Interval
    difference: float
    difference_interval: Interval


def paired(own: Tensor, other: Tensor, groups: Groups, better: str) -> Paired:
    """Compare the values [n] of two rows; `better` is `low` or `high`.

    Images without a value, NaN, are left out; at least one has to have one.
    """
    gap = (own - other).double()
    there = gap.isfinite()
    groups = groups.among(there)
    won = ((gap > 0) if better == "high" else (gap < 0)).double() + 0.5 * (gap == 0).double()
    found: list[tuple[float, Interval]] = []
    for each in (won, gap):
        mean, size = float(each[there].mean()), torch.tensor([len(rows) for rows in groups.rows]).double()
        total, chosen = groups.means(each) * size, groups.draws()
        drawn = total[chosen].sum(1) / size[chosen].sum(1)
        found.append((mean, interval(mean, drawn) if len(groups) > 1 else (mean, mean)))
    (wins, (low, high)), (difference, between) = found
    return Paired(wins, (max(0.0, low), min(1.0, high)), difference, between)
