"""Several models that sample the same prompts from the same noise.

What has been sampled is kept on disk, so an interrupted lineup continues where it stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import read_hashed, write_tensors
from ..evaluation.plan import digest, seed_of
from ..evaluation.speed import timed
from ..reading import reading
from ..report.images import to_uint8

BATCH = 4  # images that are sampled at once
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Shots:
    """The prompt and the seed of every image of a lineup."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One model of a lineup.

    `identity` tells the model from every other, and from what it was before it was trained further; `teacher`
    is its teacher's. The `nfe` are those of one image.
    """

    name: str
    role: str  # student | teacher
    base: str
    steps: int
    guidance: float
    nfe: int
    identity: str
    teacher: str


@dataclass(frozen=True)
class Drawn:
    """What one model sampled.

    `images` [N, 3, H, W] or clips [N, F, 3, H, W] are bytes. `seconds` are those of an image in the fastest
    whole batch.
    """

    entry: Entry
    images: Tensor
    seconds: float

    @property
    def unit(self) -> Tensor:
        """The same images in [0, 1]."""
        return self.images.float() / 255


def shots_of(prompts: Sequence[str], count: int) -> Shots:
    """Return `count` images of the prompts in turn.

    A repeated prompt gets another seed each time.
    """
    asked = [(prompts[i % len(prompts)], i // len(prompts)) for i in range(count)]
    return Shots(tuple(prompt for prompt, _ in asked), tuple(seed_of(*one) for one in asked))


def kept_at(cache: Path, entry: Entry, shots: Shots, start: int) -> Path:
    """Return the file of the batch that begins with image `start`.

    The file's name does not tell the model.
    """
    about = [entry.identity, entry.steps, entry.guidance, shots.prompts, shots.seeds, BATCH]
    return cache / f"{digest(about)[:16]}-{start:04d}.safetensors"


def missing(cache: Path, entry: Entry, shots: Shots) -> int:
    """Return how many images of a model are not kept yet."""
    batches = range(0, len(shots.prompts), BATCH)
    return sum(len(shots.prompts[i : i + BATCH]) for i in batches if not kept_at(cache, entry, shots, i).exists())


def drawn(entry: Entry, draw: Draw, shots: Shots, cache: Path, tell: Callable[[int], None]) -> Drawn:
    """Return all images of one model.

    What is not kept yet is sampled. `tell` is called with the number of images of every batch. Raises
    ReadError for a kept file that is damaged, and ValueError for a model that samples neither images nor
    clips.
    """
    parts, seconds = [], []
    for images, each in _batches(entry, draw, shots, cache):
        parts.append(images)
        seconds.append(each)
        tell(len(images))
    whole = seconds[: len(shots.prompts) // BATCH] or seconds
    return Drawn(entry, torch.cat(parts), min(whole))


def _batches(entry: Entry, draw: Draw, shots: Shots, cache: Path) -> Iterator[tuple[Tensor, float]]:
    for start in range(0, len(shots.prompts), BATCH):
        path, rows = kept_at(cache, entry, shots, start), slice(start, start + BATCH)
        if not path.exists():
            sampled = timed(partial(draw, shots.prompts[rows], shots.seeds[rows]))
            found = sampled.images
            if found.ndim not in (4, 5) or found.shape[-3] != 3:
                raise ValueError(
                    f"{entry.name}: it samples states {list(found.shape[1:])}, allowed are images and clips"
                )
            write_tensors(
                path, {"images": to_uint8(found), "seconds": torch.tensor([sampled.seconds], dtype=torch.float64)}
            )
        with reading(path, "delete it and run the same command again"):
            tensors, _ = read_hashed(path)
            images, each = tensors["images"], float(tensors["seconds"])
            if images.dtype != torch.uint8 or len(images) != len(shots.prompts[rows]):
                raise ValueError("it holds other images")
        yield images.clone(), each
