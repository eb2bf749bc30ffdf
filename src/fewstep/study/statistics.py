"""Intervals of win rates, and agreement between raters."""

import math
from collections.abc import Sequence
from itertools import permutations

Z = 1.959963984540054  # 97.5 % of the standard normal distribution


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share among `count` votes.

    `(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)` (Wilson, JASA 22, 1927). The
    interval stays within [0, 1] and is not empty where all votes are the same.
    """
    if not count > 0:
        return 0.0, 1.0
    square = Z * Z / count
    middle, half = share + square / 2, Z * math.sqrt(share * (1 - share) / count + square / count / 4)
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return max(0.0, low), min(1.0, high)


def effective_votes(scores: Sequence[Sequence[float]]) -> float:
    """Return how many independent votes the votes on prompts are worth.

    `scores` has the votes of every prompt, each from 0 to 1. Votes on one prompt are alike: many raters make
    no new prompts. `p (1 - p) / v`, with the variance v of the mean over prompts (Kish, Survey Sampling,
    1965, design effect), at least the number of prompts and at most the number of votes.
    """
    known = [s for s in scores if s]
    votes, prompts = sum(map(len, known)), len(known)
    if prompts < 2:
        return float(prompts)
    share = sum(map(sum, known)) / votes
    # Linearised variance of a ratio of sums; with as many votes on every prompt, that of the prompts' means.
    off = [sum(s) - share * len(s) for s in known]
    variance = prompts / (prompts - 1) * sum(x * x for x in off) / votes**2
    if not variance:
        return float(votes) if 0 < share < 1 else float(prompts)
    return min(float(votes), max(float(prompts), share * (1 - share) / variance))


def krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
    """Return Krippendorff's alpha of ordered values.

    `units` has the values that raters gave to every unit, as whole numbers in their order; raters may be
    missing. 1 is agreement, 0 what chance would give. `1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck`, with
    coincidences o, their sums n_c, and the ordinal distance
    `d_ck = (n_c / 2 + n_(c+1) + ... + n_k / 2)^2` (Krippendorff, Content Analysis, 2004, ch. 11).

    None where no unit has two values, or all values are the same.
    """
    known = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in known for value in unit})
    pairs: dict[tuple[int, int], float] = {}
    for unit in known:
        for a, b in permutations(unit, 2):
            pairs[a, b] = pairs.get((a, b), 0.0) + 1 / (len(unit) - 1)
    sums = {c: sum(pairs.get((c, k), 0.0) for k in values) for c in values}

    def distance(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        return (sum(sums[g] for g in values if low <= g <= high) - (sums[low] + sums[high]) / 2) ** 2

    expected = sum(sums[c] * sums[k] * distance(c, k) for c in values for k in values)
    if not expected:
        return None
    seen = sum(weight * distance(*pair) for pair, weight in pairs.items())
    return 1 - (sum(sums.values()) - 1) * seen / expected
