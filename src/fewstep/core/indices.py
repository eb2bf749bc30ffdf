"""Places in a sequence."""


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return up to `most` places of a sequence of `count`, evenly spaced.

    The first and the last one are there: round(i (count - 1) / (n - 1)) for i < n = min(count, most), exactly.
    A tensor's float32 steps would leave a sequence of more than 2^24.
    """
    n = min(count, most)
    return [0] * n if n < 2 else [round(i * (count - 1) / (n - 1)) for i in range(n)]
