"""How long one picture takes."""

import time
from collections.abc import Callable

from torch import Tensor


def timed(draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """(pictures on the CPU, seconds per picture). Copying them there waits for whatever device they are drawn on."""
    began = time.perf_counter()
    pictures = draw().cpu()
    return pictures, (time.perf_counter() - began) / len(pictures)


def seconds_per_image(draw: Callable[[], Tensor], repeats: int = 5) -> float:
    """The best of `repeats` after one call that is not counted: what else the machine does can only add to it."""
    draw()
    return min(timed(draw)[1] for _ in range(repeats))
