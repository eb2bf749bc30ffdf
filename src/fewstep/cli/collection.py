"""Python's collection of garbage, kept from heavy imports."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage within the block, nor later of what it leaves.

    What is imported stays until the end. Collections look at all of it again and again, and take a fifth of the time
    that torch and diffusers take to be imported.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
