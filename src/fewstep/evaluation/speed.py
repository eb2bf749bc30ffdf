"""Time per image."""

import time
from collections.abc import Callable

from torch import Tensor


def timed(draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return images on the CPU, and the seconds per image.

    Copying to the CPU waits for the device that samples.
    """
    began = time.perf_counter()
    images = draw().cpu()
    return images, (time.perf_counter() - began) / len(images)
