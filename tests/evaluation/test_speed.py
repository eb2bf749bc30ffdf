"""Seconds per image, on a clock that the test winds."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fewstep.evaluation import speed


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[float]], Callable[[], Tensor]]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def drawing_for(seconds: Iterator[float]) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            now[0] += next(seconds)
            return torch.zeros(4, 3, 2, 2)

        return draw

    return drawing_for


def test_time_is_per_image(drawing: Callable[[Iterator[float]], Callable[[], Tensor]]) -> None:
    images, seconds = speed.timed(drawing(iter([2.0])))
    assert images.shape == (4, 3, 2, 2)
    assert seconds == 0.5
