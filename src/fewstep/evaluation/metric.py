"""What a metric is: how it is computed from a row's measurements, and how tables and curves show it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .distances import Moments


class Measurement(Protocol):
    """A row of images measured next to a reference and a teacher. What a protocol does not have is None."""

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
        """Rank of each prompt's own name among all named real images, from 0."""

    @property
    def held_out_ranks(self) -> Tensor | None:
        """The same for prompts that the teacher was not trained on."""

    @property
    def tones(self) -> tuple[float, float] | None:
        """Shares of images with the skin tone of their prompt, of known and of held-out prompts."""

    @property
    def diversity(self) -> float | None:
        """Mean distance of two seeds of a prompt, where 1 is that of two images of the reference."""

    @property
    def teacher_diversity(self) -> float | None:
        """The same of the teacher."""

    @property
    def seconds(self) -> float:
        """Seconds an image, of the fastest batch."""


@dataclass(frozen=True)
class Metric:
    """One number of a row. `compute` returns None if the protocol cannot say it; such a column is left out of tables.

    `better` says which values are good, None if neither end is; `factor` turns a stored value into the shown `unit`. With `curve` it is
    followed while a student trains.
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
