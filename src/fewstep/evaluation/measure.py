"""Measurement of one generator's images.

Measurements are kept, so an interrupted measurement continues where it stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import write_tensors
from ..reading import reading, require_regular
from ..tensors import finite
from .alignment import BINS, colour_histogram
from .features import feature_network, features
from .speed import timed

Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]
# Largest difference between two samples of one image, as a share of the embedding's length (float32: 2e-6).
SAME = 0.002


@dataclass(frozen=True)
class Measured:
    """Measurements of the first n images.

    `embeddings` [n, K], colour histograms `colours` [n, 125], and `seconds` per image of each batch.
    """

    embeddings: Tensor
    colours: Tensor
    seconds: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def fastest(self, batch: int) -> float:
        """Return the seconds per image of the fastest whole batch."""
        return float(self.seconds[: len(self) // batch or None].min())

    def then(self, more: "Measured") -> "Measured":
        pairs = ((self.embeddings, more.embeddings), (self.colours, more.colours), (self.seconds, more.seconds))
        return Measured(*(torch.cat(pair) for pair in pairs))


class SamplePlan(Protocol):
    """Prompt and seed of every image."""

    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...


class Space(Protocol):
    """Space in which images are compared, for example `reference.Reference`.

    `embed` maps features [B, 1280] to [B, width].
    """

    @property
    def width(self) -> int: ...
    def embed(self, features: Tensor) -> Tensor: ...


class FeatureExtractor:
    """Samples images and measures them.

    The feature network stays on the CPU, so the numbers do not depend on the device of sampling.
    """

    def __init__(self, space: Space) -> None:
        self.network, self.space = feature_network(), space
        self.nothing = Measured(torch.empty(0, space.width), torch.empty(0, BINS**3), torch.empty(0))

    def draw(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], row: str) -> Measured:
        """Sample and measure one batch.

        Images are rounded to 8 bits, as a saved PNG is. Raises ValueError that names the row if the sampler
        does not return images.
        """
        images, seconds = timed(lambda: sampler(prompts, seeds))
        if images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
            raise ValueError(
                f"row {row}: its sampler returned {list(images.shape)}; return images [{len(prompts)}, 3, H, W]"
            )
        if not images.isfinite().all() or images.min() < -1e-3 or images.max() > 1 + 1e-3:
            raise ValueError(
                f"row {row}: its images go from {images.min():.3g} to {images.max():.3g}; "
                "return finite values in [0, 1]"
            )
        images = (images.float().clamp(0, 1) * 255).round() / 255
        return Measured(
            self.space.embed(features(self.network, images)), colour_histogram(images), torch.tensor([seconds])
        )


def measure(
    gauge: FeatureExtractor,
    sampler: Sampler,
    plan: SamplePlan,
    *,
    batch: int,
    row: str,
    kept: Sequence[Path],
    keep: Path | None,
    progress: Callable[[int], None],
) -> Measured:
    """Measure all images of the plan for one row.

    The measurement starts from the longest of `kept` whose first image is the same when sampled again. New
    measurements are written to `keep`, at the end and after an exception.
    """
    done = _kept(gauge, sampler, plan, row, kept)
    before = len(done)
    progress(before)
    try:
        for start in range(before, len(plan.prompts), batch):
            part = slice(start, start + batch)
            done = done.then(gauge.draw(sampler, plan.prompts[part], plan.seeds[part], row))
            progress(len(done))
    finally:
        if keep is not None and len(done) > before:
            _write(keep, done)
    return done


def _kept(gauge: FeatureExtractor, sampler: Sampler, plan: SamplePlan, row: str, files: Sequence[Path]) -> Measured:
    found = sorted((_read(f, gauge.nothing) for f in files if f.exists()), key=len, reverse=True)
    if not found:
        return gauge.nothing
    again = gauge.draw(sampler, plan.prompts[:1], plan.seeds[:1], row).embeddings[0]
    same = (f for f in found if (f.embeddings[0] - again).norm() <= SAME * again.norm())
    return next(same, gauge.nothing)


def _read(file: Path, like: Measured) -> Measured:
    """Read earlier measurements.

    The rows have to be as wide as the rows of `like`. Raises ReadError otherwise.
    """
    with reading(f"evaluation {file}", "delete it and run the same command again"):
        tensors = load_file(require_regular(file))
        found = Measured(tensors["embeddings"], tensors["colours"], tensors["seconds"])
        shapes = [t.shape[1:] if t.ndim else None for t in (found.embeddings, found.colours, found.seconds)]
        if shapes != [like.embeddings.shape[1:], like.colours.shape[1:], like.seconds.shape[1:]]:
            raise ValueError("its tensors are of other shapes")
        if not len(found.embeddings) or len(found.embeddings) != len(found.colours) or not len(found.seconds):
            raise ValueError("its tensors are not of as many images")
        if any(t.dtype != torch.float32 or not finite(t) for t in (found.embeddings, found.colours, found.seconds)):
            raise ValueError("its numbers are not finite ones in float32")
        return found


def _write(file: Path, measured: Measured) -> None:
    write_tensors(file, {"embeddings": measured.embeddings, "colours": measured.colours, "seconds": measured.seconds})
