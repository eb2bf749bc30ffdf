"""Seconds per picture."""

import time

import pytest
import torch
from torch import Tensor

from fewstep.evaluation.speed import seconds_per_image, timed


def test_time_is_per_picture() -> None:
    def draw() -> Tensor:
        time.sleep(0.02)
        return torch.zeros(4, 3, 2, 2)

    pictures, seconds = timed(draw)
    assert pictures.shape == (4, 3, 2, 2)
    assert 0.005 <= seconds < 0.05


def test_the_best_counts_and_the_first_does_not() -> None:
    naps = iter([0.0, 0.05, 0.01, 0.05])

    def draw() -> Tensor:
        time.sleep(next(naps))
        return torch.zeros(1)

    assert seconds_per_image(draw, repeats=3) == pytest.approx(0.01, abs=0.009)
    assert next(naps, None) is None
