"""Named protocols: which prompts, which seeds, which reference. Whoever runs one by name measures the same thing.

The distance is labelled FD-efflite0 and is no FID: it sees another network, and only the leading components of its features. Its value
depends on the number of pictures, so compare the rows of one protocol; `fd_floor` is what that many real emoji get themselves.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from .alignment import COLLAPSED, diversity, name_ranks, nearest_colours, top
from .distances import Moments, frechet_distance, kernel_distance, moments
from .measure import Gauge, Measured, Sampler, measure
from .reference import FOLDER, Reference, caption, load_reference, without_tone

REFERENCE = "84e9c7e8eb8e802b26f42091a99c71d9d7d0e49a6caf747217330ffb9a03eecd"


@dataclass(frozen=True)
class EmojiProtocol:
    """How many pictures are drawn for what.

    `names`: plain prompts with one picture each, for distance and retrieval. `repeated`: how many of these get `seeds` pictures, for
    diversity. `toned`: prompts "name, skin tone" of the training set; `held_out`: such prompts that were kept out of it.
    `components`: how many enter the Frechet distance.
    """

    name: str
    names: int
    repeated: int
    seeds: int
    toned: int
    held_out: int
    components: int = 48
    batch: int = 16
    reference: str = REFERENCE

    def total(self, rows: int) -> int:
        """Pictures drawn for that many rows."""
        return rows * (self.names + self.repeated * (self.seeds - 1) + self.toned + self.held_out)


PROTOCOLS = (
    EmojiProtocol("emoji-quick", names=128, repeated=8, seeds=4, toned=16, held_out=16),
    EmojiProtocol("emoji-medium", names=512, repeated=32, seeds=4, toned=50, held_out=95),
    EmojiProtocol("emoji-full", names=1910, repeated=64, seeds=5, toned=200, held_out=95),
)


def protocol_named(name: str) -> EmojiProtocol:
    """Raises ValueError with the names there are."""
    for protocol in PROTOCOLS:
        if protocol.name == name:
            return protocol
    raise ValueError(f"protocol: got {name!r}; choose one of {', '.join(p.name for p in PROTOCOLS)}")


@dataclass(frozen=True)
class Row:
    """One generator. `sampler(prompts, seeds)` gives pictures [B, 3, H, W] in [0, 1]; `nfe` are its network evaluations for one of them."""

    model: str
    steps: int
    guidance: float
    nfe: int
    sampler: Sampler


@dataclass(frozen=True)
class Plan:
    """What every row draws: plain names, their repetitions prompt by prompt, toned prompts, held-out prompts."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def plan(protocol: EmojiProtocol, reference: Reference) -> Plan:
    """Prompts are ordered by their hash, so that each part of a small protocol is the beginning of that part of a large one.

    A picture's seed is a hash of its prompt and of the number of the repetition. Raises ValueError where there are too few prompts.
    """
    names = _choose("names", reference.names, protocol.names)
    again = [(name, k) for name in _choose("repeated", names, protocol.repeated) for k in range(1, protocol.seeds)]
    trained = {caption(n, t) for n in reference.toned for t in reference.tones if t} - set(reference.held_out)
    toned = _choose("toned", trained, protocol.toned) + _choose("held_out", reference.held_out, protocol.held_out)
    pictures = [*((name, 0) for name in names), *again, *((prompt, 0) for prompt in toned)]
    return Plan(tuple(p for p, _ in pictures), tuple(int(_hash(f"{p}/{k}")[:8], 16) >> 1 for p, k in pictures))


def _choose(option: str, prompts: Iterable[str], count: int) -> list[str]:
    there = sorted(set(prompts), key=_hash)
    if not 1 <= count <= len(there):
        raise ValueError(f"protocol.{option}: got {count}; choose 1..{len(there)}")
    return there[:count]


def _hash(value: object) -> str:
    return hashlib.sha256((value if isinstance(value, str) else json.dumps(value)).encode()).hexdigest()


def evaluate(
    rows: Sequence[Row],
    protocol: EmojiProtocol,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
    *,
    shipped: Path | None = None,
    reference: Path = FOLDER,
) -> dict[str, Any]:
    """What eval.json holds: every row measured on the same prompts and, picture by picture, the same seeds.

    `progress` hears how many of `protocol.total(len(rows))` pictures are done. Measurements are kept in `cache`, finished or not: the same
    call goes on from there, to the same numbers. `shipped` is such a folder too, but only read. A kept row is trusted if its first picture
    is drawn the same again, so that a student that was trained further is measured anew.
    The teacher that `fd_teacher` and `diversity_ratio` compare with is the first row called "teacher" with the most steps.
    Raises ValueError for another reference than the protocol's, and for a sampler that returns no pictures in [0, 1].
    """
    known = load_reference(reference)
    if known.sha256 != protocol.reference:
        found = f"the reference {reference} has hash {known.sha256[:12]}, expected {protocol.reference[:12]}"
        raise ValueError(f"protocol {protocol.name}: {found}; install fewstep again, or name your own reference's hash in the protocol")
    drawn, gauge = plan(protocol, known), Gauge(known)
    stamp = {"prompts_sha256": _hash(drawn.prompts), "seeds_sha256": _hash(drawn.seeds), "reference_sha256": known.sha256}
    measured: list[Measured] = []
    for row in rows:
        title = f"{row.model}-{row.steps}steps-guidance{row.guidance:g}"
        file = f"{title}-{_hash([*stamp.values(), protocol.batch, row.nfe])[:12]}.safetensors"
        before = len(measured) * len(drawn.prompts)
        measured.append(
            measure(
                gauge,
                row.sampler,
                drawn.prompts,
                drawn.seeds,
                batch=protocol.batch,
                row=title,
                kept=[folder / file for folder in (cache, shipped) if folder is not None],
                keep=None if cache is None else cache / file,
                progress=lambda done, before=before: progress(before + done),  # type: ignore[misc]
            )
        )
    teachers = [i for i, row in enumerate(rows) if row.model == "teacher"]
    best = measured[max(teachers, key=lambda i: rows[i].steps)] if teachers else None
    ruler = Ruler(protocol, drawn, known)
    return {
        "protocol": protocol.name,
        "distance": f"FD-efflite0, {protocol.components} components",
        "versions": {"fewstep": __version__, "torch": str(torch.__version__)},
        **stamp,
        "batch": protocol.batch,
        "fd_floor": ruler.floor(),
        "rows": [
            {"model": r.model, "steps": r.steps, "guidance": r.guidance, "nfe": r.nfe, "n": protocol.names, **ruler.numbers(m, best)}
            for r, m in zip(rows, measured, strict=True)
        ],
    }


class Ruler:
    """From what was measured to the numbers of a row."""

    def __init__(self, protocol: EmojiProtocol, drawn: Plan, reference: Reference) -> None:
        self.protocol, self.reference = protocol, reference
        self.gallery = reference.halfway_white(reference.gallery)
        sizes = [protocol.names, protocol.repeated * (protocol.seeds - 1), protocol.toned, protocol.held_out]
        self.plain, self.again, self.toned, self.held_out = (slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(4))
        self.prompts = drawn.prompts
        self.real = self._moments(reference.gallery)
        self.spread = float(torch.pdist(reference.gallery).mean())

    def floor(self) -> float:
        """The distance of as many real emoji, those of the prompts, to all of them: what the number of pictures alone does."""
        first = {name: i for i, name in reversed(list(enumerate(self.reference.names)))}
        return frechet_distance(self.real, self._moments(self.reference.gallery[[first[p] for p in self.prompts[self.plain]]]))

    def numbers(self, row: Measured, teacher: Measured | None) -> dict[str, Any]:
        plain, ranks = row.embeddings[self.plain], self._ranks(row, self.plain)
        held_out = self._ranks(row, self.held_out)
        ours, theirs = self._diversity(row), None if teacher is None else self._diversity(teacher)
        compared = teacher is not None and teacher is not row
        return {
            "fd_real": frechet_distance(self.real, self._moments(plain)),
            "fd_teacher": frechet_distance(self._moments(teacher.embeddings[self.plain]), self._moments(plain)) if compared else None,
            "kid_real": kernel_distance(self.reference.gallery, plain),
            "retrieval_top1": top(ranks, 1),
            "retrieval_top5": top(ranks, 5),
            "tone": self._tone(row, self.toned),
            "held_out_top1": top(held_out, 1),
            "held_out_top5": top(held_out, 5),
            "held_out_tone": self._tone(row, self.held_out),
            "diversity": ours,
            "diversity_ratio": ours / theirs if theirs else None,
            "collapsed": ours < COLLAPSED * theirs if theirs else None,
            "seconds_per_image": float(row.seconds[: len(row) // self.protocol.batch or None].min()),
        }

    def _moments(self, x: Tensor) -> Moments:
        return moments(x[:, : self.protocol.components])

    def _ranks(self, row: Measured, part: slice) -> Tensor:
        toned = part != self.plain
        own = self.reference.label_of(without_tone(p)[0] if toned else p for p in self.prompts[part])
        return name_ranks(self.reference.halfway_white(row.embeddings[part]), self.gallery, self.reference.labels, own)

    def _tone(self, row: Measured, part: slice) -> float:
        pairs = [without_tone(p) for p in self.prompts[part]]
        candidates = self.reference.colours[[self.reference.toned.index(name) for name, _ in pairs]]
        asked = torch.tensor([self.reference.tones.index(tone) for _, tone in pairs])
        return float((nearest_colours(row.colours[part], candidates) == asked).double().mean())

    def _diversity(self, row: Measured) -> float:
        """Mean distance of two seeds of a prompt, in units of that of two real emoji."""
        firsts, again = row.embeddings[self.plain][: self.protocol.repeated], row.embeddings[self.again]
        together = torch.cat([firsts[:, None], again.unflatten(0, (self.protocol.repeated, -1))], 1)
        return float(diversity(together).mean()) / self.spread
