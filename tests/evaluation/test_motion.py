"""Motion of videos whose motion is known."""

import pytest
import torch

from fewstep.evaluation.motion import motion, rank_correlation


def test_a_still_does_not_move_and_a_ramp_moves_by_its_slope() -> None:
    still = torch.rand(1, 1, 3, 4, 4).expand(2, 5, 3, 4, 4)
    assert motion(still).tolist() == [0, 0]
    slopes = torch.tensor([1.0, -3.0]) / 255
    ramp = 0.5 + slopes[:, None, None, None, None] * torch.arange(5.0)[:, None, None, None].expand(5, 3, 4, 4)
    assert motion(ramp).tolist() == pytest.approx([1, 3], rel=1e-4)
    assert float(motion(ramp[0])) == pytest.approx(1, rel=1e-4)


def test_motion_of_a_part_counts_by_its_area() -> None:
    blink = torch.zeros(1, 3, 3, 4, 4)
    blink[:, 1, :, :2, :2] = 1
    assert float(motion(blink)) == pytest.approx(255 / 4)


def test_ranks_agree_whatever_the_scale() -> None:
    a = torch.tensor([0.1, 5.0, 2.0, 9.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 2.0, 4.0, 3.0])) == pytest.approx(
        0.4
    )  # 1 - 6 * (0 + 1 + 4 + 1) / (4 * 15)
