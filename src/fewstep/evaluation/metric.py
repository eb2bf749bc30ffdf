"""The definition of a metric.

A metric says how a number is computed from a row's measurements, and how tables and curves show the number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .distances import KernelReference, Moments


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
    def gallery(self) -> KernelReference | None:
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
    def tones(self) -> tuple[Tensor, Tensor] | None:
        """Whether each image has the prompt's skin tone.

        The two tensors are of known and of held-out prompts.
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
    def variety(self) -> float | None:
        """Mean distance between images of different prompts."""

    @property
    def teacher_variety(self) -> float | None:
        """The teacher's variety."""

    @property
    def looks(self) -> Tensor:
        """Appearance [n, 7] of the row's images, see `looks.LOOKS`."""

    @property
    def teacher_looks(self) -> Tensor | None:
        """Appearance [n, 7] of the teacher's images."""

    @property
    def apart(self) -> Tensor | None:
        """Distance [n] of each image to the teacher's from the same noise.

        In units of the mean distance between two seeds of the teacher's. None for the teacher's own row.
        """

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """Scores [n] by networks of others, under their keys.

        NaN where one is not of the image's prompt.
        """

    @property
    def deep(self) -> Tensor | None:
        """Features [n, D] in which FID and KID are distances."""

    @property
    def deep_real(self) -> KernelReference | None:
        """Such features of real images."""

    @property
    def deep_moments(self) -> Moments | None:
        """The moments of such features, that FID compares with."""

    @property
    def torch_moments(self) -> Moments | None:
        """The same of images that were resized as torch-fidelity does."""

    @property
    def perceptual(self) -> Tensor | None:
        """Mean LPIPS between two seeds of each prompt [P]."""

    @property
    def seconds(self) -> float:
        """Seconds per image, of the fastest batch."""

    @property
    def memory(self) -> float | None:
        """Largest memory while the row was sampled, in MiB."""


@dataclass(frozen=True)
class Metric:
    """One number of a row.

    `compute` returns None if the protocol lacks the number; tables omit such a column. `better` says which
    values are good, None if neither end is. `needs` says what the number takes beyond the model and its teacher.
    `factor` converts a stored value to the shown `unit`. With `curve` the metric is followed while a student trains.
    `kind` is the table in which a report shows it. `each` returns the number of every image [n], where it is a mean
    over images: such a metric can be compared image by image.
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
    needs: str = ""
    kind: Literal["quality", "drift", "cost"] = "quality"
    each: Callable[[Measurement], Tensor | None] | None = None
