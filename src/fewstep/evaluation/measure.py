"""Measurement of one generator's images.

Measurements are kept, so an interrupted measurement continues where it stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import write_tensors
from ..core.indices import evenly_spaced
from ..reading import reading, require_regular
from ..tensors import finite
from .alignment import BINS, colour_histogram
from .features import feature_network, features
from .looks import LOOKS, looks
from .lpips import SIDE, thumbnails
from .scorer import NO_EXTRA, Extra
from .speed import Sampled, timed

Sampler = Callable[[Sequence[str], Sequence[int]], Sampled]
PER_BATCH = ("seconds", "memory")  # what is measured of a batch
FRAMES = 4  # frames of a clip whose features are averaged
# Largest difference between two samples of one image, as a share of the embedding's length (float32: 2e-6).
SAME = 0.002


@dataclass(frozen=True)
class Measured:
    """Measurements of the first n images.

    `embeddings` [n, K], colour histograms `colours` [n, 125] (or [n, 0]) and appearance `looks` [n, 7]; of each
    batch the `seconds` per image and the largest `memory` in MiB. `scores` [n, S] are those of S scorers, NaN where one
    is not of the prompt, `deep` [n, D] other features, and `thumbnails` [n, 3 * 64 * 64] small copies; all three may
    have no columns.
    """

    embeddings: Tensor
    colours: Tensor
    looks: Tensor
    scores: Tensor
    deep: Tensor
    thumbnails: Tensor
    seconds: Tensor
    memory: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def fastest(self, batch: int) -> float:
        """Return the seconds per image of the fastest whole batch."""
        return float(self.seconds[: len(self) // batch or None].min())

    def peak(self) -> float | None:
        """Return the largest memory of all batches in MiB.

        None where it could not be measured.
        """
        return float(self.memory.max()) or None

    def named(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores [n] by the scorers' keys."""
        return dict(zip(keys, self.scores.unbind(1), strict=True))

    def then(self, more: "Measured") -> "Measured":
        return Measured(
            *(torch.cat(pair) for pair in zip(self.tensors().values(), more.tensors().values(), strict=True))
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


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

    The feature network stays on the CPU, so the numbers do not depend on the device of sampling. Colour
    histograms are made on request.
    """

    def __init__(self, space: Space, colours: bool = True, extra: Extra = NO_EXTRA) -> None:
        self.network, self.space, self.colours, self.extra = feature_network(), space, colours, extra
        deep = 0 if extra.deep is None else extra.deep.features(torch.zeros(1, 3, 8, 8)).shape[1]
        small = 0 if extra.pairs is None else 3 * SIDE**2
        widths = (space.width, BINS**3 if colours else 0, len(LOOKS), len(extra.scorers), deep, small)
        one, two, three, four, five, six = (torch.empty(0, width) for width in widths)
        self.nothing = Measured(one, two, three, four, five, six, torch.empty(0), torch.empty(0))

    def draw(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], row: str) -> Measured:
        """Sample and measure one batch.

        Images are rounded to 8 bits, as a saved PNG is. Raises ValueError that names the row if the sampler
        does not return images or clips.
        """
        sampled = timed(lambda: sampler(prompts, seeds))
        images = sampled.images
        if images.ndim not in (4, 5) or len(images) != len(prompts) or images.shape[-3] != 3:
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
            self._embedded(images),
            colour_histogram(images) if self.colours else torch.empty(len(images), 0),
            looks(images, sampled.states),
            self._scores(images, prompts),
            torch.empty(len(images), 0) if self.extra.deep is None else self.deep_of(images),
            torch.empty(len(images), 0) if self.extra.pairs is None else thumbnails(images),
            torch.tensor([sampled.seconds]),
            torch.tensor([0.0 if self.extra.stamp() else sampled.memory]),  # other networks lie beside the sampled one
        )

    def _embedded(self, images: Tensor) -> Tensor:
        """Return embeddings [B, K] of images, or of clips.

        That of a clip is the mean over a few of its frames.
        """
        stills = _stills(images)
        found = self.space.embed(features(self.network, stills.flatten(0, 1)))
        return found if stills.shape[1] == 1 else found.unflatten(0, stills.shape[:2]).mean(1)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B, S].

        That of a clip is the mean over a few of its frames, unless the scorer takes clips as a whole. Raises ValueError
        where such a scorer is given images.
        """
        stills, found = _stills(images), []
        asked = [prompt for prompt in prompts for _ in range(stills.shape[1])]
        for scorer in self.extra.scorers:
            if scorer.clips and images.ndim == 4:
                raise ValueError(f"--metrics {scorer.key}: is of videos, this model makes images; leave it out")
            if scorer.clips:
                found.append(scorer.score(images, prompts).float().cpu())
            else:
                scores = scorer.score(stills.flatten(0, 1), asked).float().cpu()
                found.append(scores.unflatten(0, stills.shape[:2]).mean(1))
        return torch.stack(found, 1) if found else torch.empty(len(images), 0)

    def deep_of(self, images: Tensor) -> Tensor:
        """Return the other features [B, D] of images.

        Those of a clip are of its middle frame.
        """
        assert self.extra.deep is not None
        return self.extra.deep.features(images if images.ndim == 4 else images[:, images.shape[1] // 2])


def _stills(images: Tensor) -> Tensor:
    """Return images as clips of one frame, clips as fewer frames.

    [B, 1, 3, H, W], or [B, F, 3, H, W] of evenly spaced frames.
    """
    if images.ndim == 4:
        return images[:, None]
    return images[:, evenly_spaced(images.shape[1], FRAMES)]


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
        tensors, wanted = load_file(require_regular(file)), like.tensors()
        found = Measured(*(tensors[name] for name in wanted))
        named = found.tensors()
        if any(not t.ndim or t.shape[1:] != wanted[name].shape[1:] for name, t in named.items()):
            raise ValueError("its tensors are of other shapes")
        images, batches = (
            {len(named[n]) for n in names} for names in (tuple(wanted.keys() - set(PER_BATCH)), PER_BATCH)
        )
        if len(images) != 1 or len(batches) != 1 or 0 in images | batches:
            raise ValueError("its tensors are not of as many images")
        if any(t.dtype != torch.float32 for t in named.values()) or not all(
            finite(t[~t.isnan()] if name == "scores" else t) for name, t in named.items()
        ):
            raise ValueError("its numbers are not finite ones in float32")
        return found


def _write(file: Path, measured: Measured) -> None:
    write_tensors(file, measured.tensors())
