"""How long one picture takes."""

import time
from collections.abc import Callable

from torch import Tensor


def timed(draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """(pictures on the CPU, seconds per picture). Copying them there waits for whatever device they are drawn on."""
    began = time.perf_counter()
    pictures = draw().cpu()
    return pictures, (time.perf_counter() - began) / len(pictures)
