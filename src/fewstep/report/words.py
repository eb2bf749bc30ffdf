"""Numbers as people read them."""

import math
from typing import TypeGuard


def finite(value: object) -> TypeGuard[float]:
    """Return whether `value` is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def duration(seconds: float) -> str:
    """Format seconds in the two largest units.

    `48 s`, `7 min 30 s`, `2 h 5 min`, `3 d 4 h`.
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    first = next((i for i, (n, _) in enumerate(parts) if n), 3)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n)


def times(ratio: float) -> str:
    """Format a factor with two significant digits.

    `25×`, `1.3×`.
    """
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def plural(count: float, noun: str) -> str:
    """Format a count with its noun, as `1 step`, `4 steps`."""
    return f"{count:g} {noun}{'s' if count != 1 else ''}"


def size(count: int) -> str:
    """Format bytes in GiB, MiB or KiB."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
