"""Evaluation of models by the models' own classes or prompts.

A student's images are compared with the teacher's images and, where real images exist, with real images.

No reference is shipped: distances are in the leading principal components of the square roots of
EfficientNet-lite0 features. The components are computed from the real images, otherwise from the teacher's
images, in a unit in which these images have a total variance of 100. Every distance is between two sets of
the same number of images and depends on that number, so compare only rows of one table.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..hashes import hash_of
from .alignment import diversity
from .bootstrap import BLOCK, Groups, groups_of
from .distances import (
    KernelReference,
    Moments,
    frechet_distance,
    kernel_reference,
    moments,
    principal_components,
)
from .features import WIDTH, features
from .lpips import perceptual_diversity
from .measure import FeatureExtractor
from .plan import digest, seed_of
from .prompt_lists import LISTS, PromptList
from .protocols import Row, best_teacher, compared, measured_rows
from .reference import VARIANCE
from .scorer import NO_EXTRA, Extra, require_extra, require_list


@dataclass(frozen=True)
class ImageProtocol:
    """A protocol of `count` images, all classes or prompts in turn.

    The images are compared with as many images of the teacher and as many real images, in `components`
    dimensions. A text-to-image model samples `seeds` images of each prompt: of the user's prompts, or of the
    `prompts` that the protocol names.
    """

    name: str
    count: int
    components: int = 48
    batch: int = 16
    seeds: int = 2
    prompts: PromptList | None = None

    def total(self, rows: int) -> int:
        """Return the number of sampled images for that many rows."""
        return rows * self.count


SEEDS = 32  # images of a prompt whose pairwise distances are computed
OWN = (  # of the run's held-out prompts; few images at once, as the model may be large
    ImageProtocol("own-quick", 64, components=24, batch=4, seeds=4),
    ImageProtocol("own", 512, batch=4, seeds=4),
)
IMAGES = (
    ImageProtocol("images-quick", 128),
    ImageProtocol("images", 512),
    ImageProtocol("images-full", 5000),
)
QUICK_PROMPTS = 32  # of a list's small protocol


def _of_list(known: PromptList) -> Iterator[ImageProtocol]:
    """Return the small and the whole protocol of a list of prompts."""
    few = ImageProtocol(f"{known.name}-quick", 2 * QUICK_PROMPTS, components=24, batch=4, seeds=2, prompts=known)
    return iter((few, ImageProtocol(known.name, known.seeds * known.count, batch=4, seeds=known.seeds, prompts=known)))


LISTED = tuple(protocol for known in LISTS for protocol in _of_list(known))
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
    variety: float | None
    teacher_variety: float | None
    looks: Tensor
    teacher_looks: Tensor | None
    apart: Tensor | None
    seconds: float
    memory: float | None
    scores: Mapping[str, Tensor]
    deep: Tensor | None = None
    deep_real: KernelReference | None = None
    deep_moments: Moments | None = None
    torch_moments: Moments | None = None
    perceptual: Tensor | None = None
    gallery: KernelReference | None = None
    ranks: Tensor | None = None
    held_out_ranks: Tensor | None = None
    tones: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Spread:
    """How images differ: `seeds` within prompts, `prompts` between them.

    `seeds` is the mean distance of two images of a prompt, and `within` [G] the same of each group; None where
    a prompt has a single image. `between` [G, G] are distances of the groups' first images, and `apart` [G, G] says
    where these are of different prompts.
    """

    seeds: float | None
    within: Tensor | None
    between: Tensor
    apart: Tensor

    def drawn_seeds(self, drawn: Tensor | None) -> float | None:
        """Return `seeds` of drawn groups: scaled by what the draw changes."""
        if drawn is None or self.seeds is None or self.within is None:
            return self.seeds
        return self.seeds * float(self.within[drawn].mean() / self.within.mean().clamp(min=1e-12))

    def drawn_prompts(self, drawn: Tensor | None) -> float | None:
        """Return the mean distance of images of different prompts.

        None where there is one prompt alone. A draw of one prompt again and again says nothing: the value of all.
        """
        if not bool(self.apart.any()):
            return None
        chosen = torch.arange(len(self.apart)) if drawn is None else drawn
        apart = self.apart[chosen][:, chosen]
        return float(self.between[chosen][:, chosen][apart].mean()) if bool(apart.any()) else self.drawn_prompts(None)


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
    """Choose prompts by hash, of which each is sampled `protocol.seeds` times.

    Several seeds of a prompt show whether seeds still matter.
    """
    return tuple(sorted(set(prompts), key=digest)[: max(1, protocol.count // protocol.seeds)])


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
    extra: Extra = NO_EXTRA,
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
    require_extra(extra, protocol.name, count, real is not None)
    require_list(extra, protocol.name, "" if protocol.prompts is None else protocol.prompts.name)
    drawn, gauge = asked(protocol, classes), FeatureExtractor(Roots(), colours=False, extra=extra)
    stamp = {"prompts_sha256": digest(drawn.prompts), "seeds_sha256": digest(drawn.seeds)}
    measured = measured_rows(rows, drawn, gauge, [*stamp.values(), "roots"], protocol.batch, cache, progress)
    own = [m.embeddings for m in measured]
    others = None if real is None else Roots().embed(features(gauge.network, shuffled(real)[: 2 * count]))
    goal = None if best is None else own[best]
    reference = others[:count] if others is not None else goal
    assert reference is not None
    space = principal_components(reference, protocol.components)
    unit = (VARIANCE / space.variance.sum().clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    groups = groups_of(drawn.prompts, 2 * BLOCK)
    points = [space(m.double()) * unit for m in own]
    whole = float(torch.pdist(space(reference.double()) * unit).mean())
    others_own = None if others is None else moments(space(others[:count].double()) * unit)
    deep_real = None if real is None or extra.deep is None else gauge.deep_of(shuffled(real)[:count])
    goal_moments = extra.reference
    if goal_moments is None and (extra.fid or extra.fid_torch) and deep_real is not None:
        goal_moments = moments(deep_real)
    kernel = kernel_reference(deep_real) if extra.kid and deep_real is not None else None
    keys = [scorer.key for scorer in extra.scorers]
    spreads = [spread_of(x, drawn.prompts, groups) for x in points]
    theirs = None if best is None else spreads[best]

    def at(i: int) -> Callable[[Tensor | None], Drawn]:
        """Return the measurement of a row, as a function of drawn groups."""
        same = best is None or i == best
        apart = None
        if best is not None and not same and theirs is not None:
            between_seeds = theirs.seeds or float(torch.pdist(points[best]).mean()) or 1.0
            apart = (points[i] - points[best]).norm(dim=1) / between_seeds

        seen = None if extra.pairs is None else perceptual_diversity(extra.pairs, measured[i].thumbnails, groups.rows)

        def drawn_at(chosen: Tensor | None) -> Drawn:
            index = slice(None) if chosen is None else groups.images(chosen)
            ours = spreads[i].drawn_seeds(chosen)
            compared_with = None if theirs is None else theirs.drawn_seeds(chosen)
            return Drawn(
                real=others_own,
                teacher=None if best is None or same else moments(points[best][index]),
                own=moments(points[i][index]),
                embeddings=own[i][index],
                diversity=ours / whole if ours is not None and whole else None,
                teacher_diversity=None if compared_with is None or not whole else compared_with / whole,
                variety=spreads[i].drawn_prompts(chosen),
                teacher_variety=None if theirs is None else theirs.drawn_prompts(chosen),
                looks=measured[i].looks[index],
                teacher_looks=None if best is None else measured[best].looks[index],
                apart=None if apart is None else apart[index],
                seconds=measured[i].fastest(protocol.batch),
                memory=measured[i].peak(),
                scores={key: scores[index] for key, scores in measured[i].named(keys).items()},
                deep=None if extra.deep is None else measured[i].deep[index],
                deep_real=kernel,
                deep_moments=goal_moments if extra.fid else None,
                torch_moments=goal_moments if extra.fid_torch else None,
                perceptual=seen if seen is None or chosen is None else seen[chosen],
            )

        return drawn_at

    whose = "the teacher's" if others is None else "the real images'"
    result = compared(rows, [at(i) for i in range(len(rows))], None, lambda: iter(groups.draws()), groups, count)
    for row in result["rows"]:
        for key in [k for k, v in row.items() if v is None and k not in ALWAYS]:
            del row[key]
    return {
        "protocol": protocol.name,
        "distance": (
            f"FD-efflite0, {protocol.components} components of {whose} features, {count} images against {count}"
        ),
        "versions": {"fewstep": __version__, "torch": str(torch.__version__)},
        **stamp,
        "weights_sha256": extra.weights(),
        "real_sha256": None if real is None else hash_of(real),
        "batch": protocol.batch,
        "fd_floor": frechet_distance(others_own, moments(space(others[count:].double()) * unit))
        if others_own and others is not None and len(others) == 2 * count
        else None,
        **result,
    }


def spread_of(points: Tensor, prompts: Sequence[str], groups: Groups) -> Spread:
    """Return how the images [N, K] of these prompts differ."""
    firsts = torch.stack([rows[0] for rows in groups.rows])
    names = [prompts[int(i)] for i in firsts]
    between = torch.cdist(points[firsts], points[firsts], compute_mode="donot_use_mm_for_euclid_dist")
    apart = torch.tensor([[a != b for b in names] for a in names])
    several = [rows for rows in groups.rows if len(rows) > 1]
    within = torch.stack([diversity(points[rows][None])[0] for rows in several]) if several else None
    return Spread(spread(points, prompts), within if len(several) == len(groups) else None, between, apart)


def shuffled(images: Tensor) -> Tensor:
    """Return images in a fixed order that mixes classes.

    Bytes [N, C, H, W] become colour images [N, 3, H, W] in [0, 1].
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].expand(-1, 3, -1, -1).float() / 255
