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
    found = speed.timed(drawing(iter([2.0])))
    assert found.images.shape == (4, 3, 2, 2) and found.states is None
    assert found.seconds == 0.5


@pytest.mark.skipif(not (speed.PROC / "clear_refs").exists(), reason="the peak can be forgotten on Linux alone")
def test_memory_is_that_of_the_batch() -> None:
    """Memory of an earlier batch does not count."""

    def draw(mebibytes: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (torch.zeros(2, 3, 8, 8), torch.ones(mebibytes, 2**18).sum(1))

    speed.timed(draw(300))
    small, large = speed.timed(draw(1)).memory, speed.timed(draw(300)).memory
    if small:  # a sandbox may have no peak to tell
        assert large - small > 250
