"""Intervals and agreement, against closed forms and published examples."""

import math

import pytest

from fewstep.study.statistics import Z, effective_votes, krippendorff_alpha, wilson

# Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, example of four observers and twelve units.
UNITS = [[1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
         [2, 2, 2, 2], [5, 5, 5], [1, 1], [3]]  # fmt: skip


def test_wilsons_interval_is_the_root_of_its_equation() -> None:
    """Its ends are the shares q at which `|p - q| = z sqrt(q (1 - q) / n)`."""
    for p, n in ((0.75, 20), (0.5, 7.5), (0.1, 300), (0.62, 1)):
        for end in wilson(p, n):
            assert abs(p - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n))
    low, high = wilson(0.75, 20)
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    low, high = wilson(1.0, 20)
    assert low == pytest.approx(20 / (20 + Z * Z)) and high == 1 and wilson(0.0, 20)[0] == 0
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_votes_of_many_raters_on_few_prompts_are_no_more_than_they_tell() -> None:
    alike = [[1.0] * 9, [0.0] * 9, [1.0] * 9, [0.0] * 9]  # raters agree: four prompts, and not 36 votes
    assert effective_votes(alike) == 4
    split = [[1.0, 0.0] * 4 for _ in range(4)]  # every prompt is like every other: the votes count one by one
    assert effective_votes(split) == 32
    one_each = [[1.0], [0.0], [1.0], [1.0], [0.5]]
    assert effective_votes(one_each) == 5
    assert effective_votes([[1.0, 1.0], [1.0, 1.0]]) == 2  # nothing is known of how prompts differ
    assert effective_votes([[1.0, 0.0]]) == 1 and effective_votes([[], []]) == 0
    mixed = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    means = [2 / 3, 1 / 3, 1, 1 / 3]
    p = sum(means) / 4
    variance = sum((m - p) ** 2 for m in means) / 3 / 4
    assert 4 < effective_votes(mixed) < 12
    assert effective_votes(mixed) == pytest.approx(p * (1 - p) / variance)


def test_agreement_is_krippendorffs_own_example() -> None:
    alpha = krippendorff_alpha(UNITS)
    assert alpha is not None and round(alpha, 3) == 0.815


def test_agreement_of_two_raters_and_two_values_has_a_closed_form() -> None:
    """`1 - (2 n - 1) disagreements / (n_0 n_1)` of n units."""
    units = [[0, 0]] * 5 + [[2, 2]] * 3 + [[0, 2]] * 2
    n, zeros, twos = len(units), 12, 8
    assert krippendorff_alpha(units) == pytest.approx(1 - (2 * n - 1) * 2 / (zeros * twos))
    assert krippendorff_alpha([[0, 0], [1, 1], [2, 2]]) == 1
    assert krippendorff_alpha([[0, 2]] * 4) == pytest.approx(1 - 7 * 4 / 16)  # raters that always differ
    assert krippendorff_alpha([[1, 1]] * 4) is None and krippendorff_alpha([[0], [2]]) is None


def test_a_tie_is_between_a_win_and_a_loss() -> None:
    near, far = [[0, 0], [2, 2], [1, 1], [0, 1]], [[0, 0], [2, 2], [1, 1], [0, 2]]
    one, two = krippendorff_alpha(near), krippendorff_alpha(far)
    assert one is not None and two is not None and one > two
