"""Prompts and seeds of a protocol.

Prompts and seeds are the same for every row and every user.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from .reference import Reference, caption


@dataclass(frozen=True)
class EmojiProtocol:
    """Numbers of images per purpose, and the reference.

    `names`: plain prompts with one image each, for distance and retrieval. `repeated`: number of these
    prompts with `seeds` images, for diversity. `toned`: prompts "name, skin tone" of the training set;
    `held_out`: such prompts outside of the training set. `reference`: the hash of the real emoji's features.
    `components`: number of principal components in the Frechet distance.
    """

    name: str
    names: int
    repeated: int
    seeds: int
    toned: int
    held_out: int
    reference: str
    components: int = 48
    batch: int = 16

    def total(self, rows: int) -> int:
        """Return the number of sampled images for that many rows."""
        return rows * (self.names + self.repeated * (self.seeds - 1) + self.toned + self.held_out)


@dataclass(frozen=True)
class Plan:
    """All prompts and seeds of a row, with the parts' slices.

    The parts are plain names, repetitions prompt by prompt, toned, and held out.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    plain: slice
    again: slice
    toned: slice
    held_out: slice


def plan(protocol: EmojiProtocol, reference: Reference) -> Plan:
    """Return the plan of a protocol.

    Prompts are ordered by hash, so each part of a small protocol is the beginning of the same part of a large
    protocol. An image's seed is a hash of the prompt and of the number of the repetition. Raises ValueError
    for counts that the reference cannot fill.
    """
    if protocol.seeds < 2:
        raise ValueError(f"protocol.seeds: got {protocol.seeds}; diversity takes at least 2 images of a prompt")
    names = _choose("names", reference.names, protocol.names)
    repeated = _choose("repeated", names, protocol.repeated)
    trained = {caption(n, t) for n in reference.toned for t in reference.tones if t} - set(reference.held_out)
    parts = (
        [(name, 0) for name in names],
        [(name, k) for name in repeated for k in range(1, protocol.seeds)],
        [(prompt, 0) for prompt in _choose("toned", trained, protocol.toned)],
        [(prompt, 0) for prompt in _choose("held_out", reference.held_out, protocol.held_out)],
    )
    images = [image for part in parts for image in part]
    ends = [sum(map(len, parts[: i + 1])) for i in range(4)]
    return Plan(
        tuple(prompt for prompt, _ in images),
        tuple(seed_of(*image) for image in images),
        *(slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)),
    )


def _choose(option: str, prompts: Iterable[str], count: int) -> list[str]:
    there = sorted(set(prompts), key=digest)
    if not 1 <= count <= len(there):
        raise ValueError(f"protocol.{option}: got {count}; choose 1..{len(there)}")
    return there[:count]


def seed_of(prompt: str, repetition: int) -> int:
    """Return an image's seed, below 2^31."""
    return int(digest(f"{prompt}/{repetition}")[:8], 16) >> 1


def digest(value: object) -> str:
    """Return the SHA-256 of a text, or of a value's JSON."""
    return hashlib.sha256((value if isinstance(value, str) else json.dumps(value)).encode()).hexdigest()
