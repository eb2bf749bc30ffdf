"""Evenly spaced places, in short and in very long sequences."""

import pytest

from fewstep.core.indices import evenly_spaced


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(0, 4, []), (1, 4, [0]), (3, 8, [0, 1, 2]), (5, 1, [0]), (9, 3, [0, 4, 8]), (6, 3, [0, 2, 5]), (4, 0, [])],
)
def test_first_and_last_are_there(count: int, most: int, expected: list[int]) -> None:
    assert evenly_spaced(count, most) == expected


@pytest.mark.parametrize("count", [49408 * 768, 2**24 + 2, 151936 * 4096 + 1])
def test_the_last_place_of_a_very_long_sequence_is_inside(count: int) -> None:
    """The embeddings of Stable Diffusion and Qwen have more numbers than float32 counts."""
    places = evenly_spaced(count, 64)
    assert places[-1] == count - 1 and places == sorted(set(places))
