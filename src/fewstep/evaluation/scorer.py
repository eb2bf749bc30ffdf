"""Metrics that networks of others compute, as this package sees them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .distances import Moments

LEAST = 2000  # images, below which FID is bias more than distance


DIMENSIONS = (  # of VBench, which it gives for any clips
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # of GenEval
ACTIONS = (  # dimensions that look for what VBench's own prompts name
    "human_action",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
OBJECTS = (  # the same with GRiT, which needs detectron2
    "object_class",
    "multiple_objects",
    "color",
    "spatial_relationship",
)


# Names of several metrics at once.
SETS: dict[str, tuple[str, ...]] = {
    "geneval": tuple(f"geneval_{task}" for task in TASKS),
    "vbench": tuple(f"vbench_{name}" for name in DIMENSIONS),
    "vbench_actions": tuple(f"vbench_{name}" for name in ACTIONS),
    "vbench_objects": tuple(f"vbench_{name}" for name in OBJECTS),
}


def spelled(names: Sequence[str]) -> list[str]:
    """Return the metrics' own names, in place of those of sets."""
    return [key for name in names for key in SETS.get(name, (name,))]


class Scorer(Protocol):
    """Anything that gives each image a number.

    `key` is that of the metric. `weights` are the hashes of its files, which eval.json records. With `clips` it scores
    clips as a whole, and no images. It may know the prompts `of` one list alone; empty stands for any prompts.
    """

    @property
    def key(self) -> str: ...
    @property
    def weights(self) -> Mapping[str, str]: ...
    @property
    def clips(self) -> bool: ...
    @property
    def of(self) -> str: ...

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B] of images or clips.

        Images are [B, 3, H, W], clips [B, F, 3, H, W]. NaN where a prompt does not ask for what is scored.
        """

    def close(self) -> None:
        """Give back what the scorer holds beyond memory."""


class DeepFeatures(Protocol):
    """Features of images in which FID and KID are distances."""

    @property
    def weights(self) -> Mapping[str, str]: ...

    def features(self, images: Tensor) -> Tensor:
        """Return features [B, D] of images [B, 3, H, W]."""


class PairDistance(Protocol):
    """A distance of two images.

    In it the seeds of a prompt are compared.
    """

    @property
    def key(self) -> str: ...
    @property
    def weights(self) -> Mapping[str, str]: ...

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances [B] of images a, b [B, 3, H, W]."""


@dataclass(frozen=True)
class Extra:
    """What is measured beyond the core.

    FID and KID are distances in the features of `deep`: to the real images, or to a published `reference`, which
    has moments alone and serves FID alone. `fid_torch` is FID with the other resizing. In `pairs` the diversity of
    seeds is measured.
    """

    scorers: tuple[Scorer, ...] = ()
    deep: DeepFeatures | None = None
    reference: Moments | None = None
    reference_sha256: str = ""
    fid: bool = False
    kid: bool = False
    fid_torch: bool = False
    pairs: PairDistance | None = None

    def weights(self) -> dict[str, str]:
        """Return the hashes of all weight files, and of reference statistics."""
        found = {"reference": self.reference_sha256} if self.reference_sha256 else {}
        for part in (self.deep, self.pairs):
            found |= {} if part is None else dict(part.weights)
        for scorer in self.scorers:
            found |= scorer.weights
        return found

    def stamp(self) -> list[str]:
        """Return what tells measurements with these networks from others."""
        keys = [scorer.key for scorer in self.scorers] + (
            ["deep-torch" if self.fid_torch else "deep"] if self.deep is not None else []
        )
        keys += [] if self.pairs is None else [self.pairs.key]
        return [*keys, *sorted(self.weights().values())] if keys else []


NO_EXTRA = Extra()


def require_list(extra: Extra, protocol: str, prompts: str) -> None:
    """Check that scorers that know one list of prompts get that one.

    `prompts` is the protocol's list; empty where the prompts are others. Raises ValueError.
    """
    for scorer in extra.scorers:
        if scorer.of not in ("", prompts):
            raise ValueError(
                f"--metrics {scorer.key}: is of the prompts of {scorer.of}, got protocol {protocol}; "
                f"choose --protocol {scorer.of} or {scorer.of}-quick"
            )


def require_extra(extra: Extra, protocol: str, count: int, real: bool) -> None:
    """Check that what is asked can be measured.

    Raises ValueError for FID of too few images, and for FID or KID without anything to compare with.
    """
    asked, name = extra.fid or extra.fid_torch, "fid_torch" if extra.fid_torch else "fid"
    if asked and count < LEAST:
        raise ValueError(
            f"--metrics {name}: protocol {protocol} has {count} images, FID takes at least {LEAST:,}, as fewer measure "
            "their number; choose a larger protocol, or --metrics kid"
        )
    if asked and extra.reference is None and not real:
        raise ValueError(
            f"--metrics {name}: there is nothing to compare with; pass --real FOLDER or --reference FILE.npz"
        )
    if extra.kid and not real:
        raise ValueError("--metrics kid: there is nothing to compare with; pass --real FOLDER")
