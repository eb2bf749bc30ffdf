"""The definition of a metric.

A metric says how a number is computed from a row's measurements, and how tables and curves show the number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .distances import Moments


class Measurement(Protocol):
    """A row of images measured next to a reference and a teacher.

    A property that the protocol lacks is None.
    """

    @property
    def real(self) -> Moments | None:
        """Moments of the real images."""

    @property
    def teacher(self) -> Moments | None:
        """Moments of the teacher's images; None for the teacher's own row."""

    @property
    def own(self) -> Moments:
        """Moments of the row's images."""

    @property
    def gallery(self) -> Tensor | None:
        """Embeddings of named real images [N, K]."""

    @property
    def embeddings(self) -> Tensor:
        """Embeddings of the row's images [n, K]."""

    @property
    def ranks(self) -> Tensor | None:
        """Rank, from 0, of each prompt's name among real images.

        The rank is among all named real images.
        """

    @property
    def held_out_ranks(self) -> Tensor | None:
        """The same rank for prompts that the teacher was not trained on."""

    @property
    def tones(self) -> tuple[float, float] | None:
        """Shares of images with the prompt's skin tone.

        The two shares are of known and of held-out prompts.
        """

    @property
    def diversity(self) -> float | None:
        """Mean distance of two seeds of a prompt.

        In units of the distance of two images of the reference.
        """

    @property
    def teacher_diversity(self) -> float | None:
        """The teacher's diversity, in the same units."""

    @property
    def seconds(self) -> float:
        """Seconds per image, of the fastest batch."""


@dataclass(frozen=True)
class Metric:
    """One number of a row.

    `compute` returns None if the protocol lacks the number; tables omit such a column. `better` says which
    values are good, None if neither end is. `factor` converts a stored value to the shown `unit`. With
    `curve` the metric is followed while a student trains.
    """

    key: str
    heading: str
    compute: Callable[[Measurement], Any]
    digits: int = 0
    better: Literal["low", "high"] | None = None
    unit: str = ""
    factor: float = 1.0
    shown: bool = True  # in the report's table
    printed: bool = True  # in the command line's table
    curve: bool = False
