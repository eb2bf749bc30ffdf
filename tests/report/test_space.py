"""Points of a box stand where its corners say, also where it is flat."""

import numpy as np
import pytest

from fewstep.report.space import VIEW, box_around, walls

POINTS = np.array([[[1.0, -2, 5], [3, 4, 6]], [[2, 1, 5.5], [1, 4, 5]]])


def test_corners_of_the_box_are_corners_on_the_page() -> None:
    box = box_around(POINTS)
    assert box.on_page(POINTS[0, 0]) == pytest.approx([0, 0])
    assert box.on_page(POINTS[0, 1]) == pytest.approx(VIEW.sum(0))
    assert box.on_page(POINTS[1, 0]) == pytest.approx(VIEW.sum(0) / 2)
    assert box.on_page(POINTS).shape == (2, 2, 2)


def test_a_shadow_is_straight_below_on_the_floor() -> None:
    box = box_around(POINTS)
    fall = box.on_page(POINTS) - box.shadow(POINTS)
    assert fall[..., 0] == pytest.approx(0)
    assert fall[..., 1] == pytest.approx(VIEW[2, 1] * np.array([[0, 1], [0.5, 0]]))


def test_a_flat_box_has_a_page() -> None:
    flat = POINTS * (1, 0, 1)
    assert box_around(flat).on_page(flat)[0, 1] == pytest.approx(VIEW[0] + VIEW[2])


def test_walls_meet_at_the_back() -> None:
    floor, left, back = walls()
    for a, b in ((floor, left), (floor, back), (left, back)):
        assert len({tuple(p) for p in a.round(9)} & {tuple(p) for p in b.round(9)}) == 2
