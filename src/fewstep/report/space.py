"""Three coordinates on a flat page.

A box is seen from the front, a little from the left and from above, without perspective.
"""

from dataclasses import dataclass

import numpy as np

# Where a box's width, depth and height go on the page: to the right, and up.
VIEW = np.array([[1.0, -0.08], [0.34, 0.24], [0.0, 0.75]])


@dataclass(frozen=True)
class Box:
    """The box between `low` and `high` [3].

    The coordinates are width, depth and height.
    """

    low: np.ndarray
    high: np.ndarray

    def on_page(self, points: np.ndarray) -> np.ndarray:
        """Project points `[..., 3]` onto the page, as `[..., 2]`.

        Every side of the box is as long as VIEW says, whatever the side measures.
        """
        size = self.high - self.low
        return (points - self.low) / np.where(size > 0, size, 1) @ VIEW

    def shadow(self, points: np.ndarray) -> np.ndarray:
        """Project the points' shadow on the floor, as `[..., 2]`."""
        return self.on_page(np.concatenate([points[..., :2], np.broadcast_to(self.low[2], points[..., 2:].shape)], -1))


def box_around(points: np.ndarray) -> Box:
    """Return the smallest box that holds all points `[..., 3]`."""
    flat = points.reshape(-1, 3)
    return Box(flat.min(0), flat.max(0))


def walls() -> np.ndarray:
    """Return floor, left and back of any box, as closed lines.

    The shape is `[3, 5, 2]`.
    """
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    return np.stack([np.insert(square, place, side, axis=1) for place, side in ((2, 0), (0, 0), (1, 1))]) @ VIEW
