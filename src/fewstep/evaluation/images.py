"""Evaluation of models by the models' own classes or prompts.

A student's images are compared with the teacher's images and, where real images exist, with real images.

No reference is shipped: distances are in the leading principal components of the square roots of
EfficientNet-lite0 features. The components are computed from the real images, otherwise from the teacher's
images, in a unit in which these images have a total variance of 100. Every distance is between two sets of
the same number of images and depends on that number, so compare only rows of one table.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from .alignment import diversity
from .distances import Moments, frechet_distance, moments, principal_components
from .features import WIDTH, features
from .measure import FeatureExtractor
from .metrics import values
from .plan import digest, seed_of
from .protocols import Row, best_teacher, measured_rows
from .reference import VARIANCE


@dataclass(frozen=True)
class ImageProtocol:
    """A protocol with `count` images per row, of all classes in turn.

    The images are compared with as many images of the teacher and as many real images, in `components`
    dimensions.
    """

    name: str
    count: int
    components: int = 48
    batch: int = 16

    def total(self, rows: int) -> int:
        """Return the number of sampled images for that many rows."""
        return rows * self.count


SEEDS = 32  # images of a prompt whose pairwise distances are computed
IMAGES = (
    ImageProtocol("images-quick", 128),
    ImageProtocol("images", 512),
    ImageProtocol("images-full", 5000),
)
FEWEST, MOST = 8, 50_000  # images of a row


def images_named(name: str) -> ImageProtocol | None:
    """Return the protocol `images-N`, or None for another name.

    For teachers that are too large for the other protocols. There are 3/8 as many components as images, but
    at most as many as the other protocols have. Raises ValueError for an N out of range.
    """
    if not (match := re.fullmatch(r"images-(\d+)", name, re.ASCII)):
        return None
    count = int(match[1][:9])
    if not FEWEST <= count <= MOST or match[1] != str(count):
        raise ValueError(f"protocol: got {name}; choose images-N of N from {FEWEST} to {MOST}")
    return ImageProtocol(name, count, min(48, 3 * count // 8))


@dataclass(frozen=True)
class SamplePlan:
    """The prompts and seeds of every row."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Roots:
    """The square roots of features, without projection.

    The principal components are known only after all images are sampled.
    """

    width: int = WIDTH

    def embed(self, features: Tensor) -> Tensor:
        """Return the square roots [B, 1280] of features [B, 1280]."""
        return features.sqrt()


@dataclass(frozen=True)
class Drawn:
    """A row of images as metrics see it; see `metric.Measurement`."""

    real: Moments | None
    teacher: Moments | None
    own: Moments
    embeddings: Tensor
    diversity: float | None
    teacher_diversity: float | None
    seconds: float
    gallery: Tensor | None = None
    ranks: Tensor | None = None
    held_out_ranks: Tensor | None = None
    tones: tuple[float, float] | None = None


# Keys that every row has, possibly with null.
ALWAYS = (
    "fd_real",
    "fd_teacher",
    "diversity",
    "diversity_ratio",
    "collapsed",
)


def asked(protocol: ImageProtocol, names: Sequence[str]) -> SamplePlan:
    """Return the plan of a protocol: classes or prompts in turn.

    Without classes the empty prompt is used. A small protocol is the beginning of a large protocol.
    """
    names = tuple(names) or ("",)
    images = [(names[i % len(names)], i // len(names)) for i in range(protocol.count)]
    return SamplePlan(tuple(name for name, _ in images), tuple(seed_of(*image) for image in images))


def chosen(protocol: ImageProtocol, prompts: Sequence[str]) -> tuple[str, ...]:
    """Choose half as many prompts as images, by hash.

    Each prompt is then sampled at least twice, which shows whether seeds still matter.
    """
    return tuple(sorted(set(prompts), key=digest)[: max(1, protocol.count // 2)])


def spread(own: Tensor, prompts: Sequence[str]) -> float | None:
    """Return the mean distance between two images of one prompt.

    own [N, K]; the mean is over all prompts, and over at most `SEEDS` images of each. Returns None if a
    prompt has a single image.
    """
    of: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        of[prompt].append(i)
    count = min(SEEDS, *map(len, of.values()), len(prompts))
    return None if count < 2 else float(diversity(own[torch.tensor([rows[:count] for rows in of.values()])]).mean())


def evaluate_images(
    rows: Sequence[Row],
    protocol: ImageProtocol,
    classes: Sequence[str],
    real: Tensor | None = None,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Return the content of eval.json, as `protocols.evaluate` does.

    `real` [N, C, H, W] are bytes of at least `protocol.count` images. `classes` are a model's classes or
    prompts, used in turn. `diversity` is the mean distance of two seeds of one class, in units of the
    distance of two images of the reference; `collapsed` means less than half of the teacher's diversity. As
    many real images are used as a row has, the same every time. `fd_floor` is the distance of as many other
    real images to these, if there are enough.

    Raises ValueError if a row has nothing to be compared with, and for too few real images.
    """
    count, best = protocol.count, best_teacher(rows)
    if real is not None and len(real) < count:
        raise ValueError(
            f"real: got {len(real)} images, protocol {protocol.name} compares {count} with {count}; "
            "choose a smaller one"
        )
    if real is None and best is None:
        raise ValueError(f"protocol {protocol.name}: there is no teacher to compare with, nor real images; pass some")
    drawn, gauge = asked(protocol, classes), FeatureExtractor(Roots())
    stamp = {"prompts_sha256": digest(drawn.prompts), "seeds_sha256": digest(drawn.seeds)}
    measured = measured_rows(rows, drawn, gauge, [*stamp.values(), "roots"], protocol.batch, cache, progress)
    own = [m.embeddings for m in measured]
    others = None if real is None else Roots().embed(features(gauge.network, shuffled(real)[: 2 * count]))
    goal = None if best is None else own[best]
    reference = others[:count] if others is not None else goal
    assert reference is not None
    space = principal_components(reference, protocol.components)
    unit = (VARIANCE / space.variance.sum().clamp(min=torch.finfo(torch.float32).tiny)).sqrt()

    def seen(roots: Tensor) -> Moments:
        return moments(space(roots.double()) * unit)

    spreads = [spread(space(m.double()) * unit, drawn.prompts) for m in own]
    theirs = None if best is None else spreads[best]
    whole = float(torch.pdist(space(reference.double()) * unit).mean())

    others_own = None if others is None else seen(others[:count])

    def measurement(i: int) -> Drawn:
        compared = None if goal is None or i == best else seen(goal)
        ours = spreads[i]
        ratio_of = None if theirs is None or not whole else theirs / whole
        relative = ours / whole if ours is not None and whole else None
        return Drawn(
            others_own, compared, seen(own[i]), own[i], relative, ratio_of, measured[i].fastest(protocol.batch)
        )

    whose = "the teacher's" if others is None else "the real images'"
    return {
        "protocol": protocol.name,
        "distance": (
            f"FD-efflite0, {protocol.components} components of {whose} features, {count} images against {count}"
        ),
        "versions": {"fewstep": __version__, "torch": str(torch.__version__)},
        **stamp,
        "batch": protocol.batch,
        "fd_floor": frechet_distance(others_own, seen(others[count:]))
        if others_own and others is not None and len(others) == 2 * count
        else None,
        "rows": [
            {
                "model": r.model,
                "steps": r.steps,
                "guidance": r.guidance.scale,
                "nfe": r.nfe,
                "n": count,
                **{k: v for k, v in values(measurement(i)).items() if v is not None or k in ALWAYS},
            }
            for i, r in enumerate(rows)
        ],
    }


def shuffled(images: Tensor) -> Tensor:
    """Return images in a fixed order that mixes classes.

    Bytes [N, C, H, W] become colour images [N, 3, H, W] in [0, 1].
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].expand(-1, 3, -1, -1).float() / 255
