"""Students and their teacher, sampling the same prompts from the same noise.

`fewstep compare` and `fewstep study` show what they sampled.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.base import Backbone, nfe_per_step
from ..backbones.load import fingerprint, source_of
from ..backbones.sizes import Size
from ..backbones.unconditional import PixelModel
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..data.prompts import find_prompts
from ..evaluation.plan import digest
from ..names import expanded, visible
from ..report.words import plural
from ..runs.lineup import Drawn, Entry, Shots, drawn, missing, shots_of
from ..runs.sampling import check_steps, sample
from ..student.card import StudentCard, card_nfe
from ..student.folder import on_hub, read_card, require_folder
from ..student.student import Student
from .evaluate import TEACHER_STEPS, own_split
from .options import in_options
from .progress import meter
from .sample import open_student

KEPT = "drawn"  # folder with what was sampled, beside what is made from it
MOST_MODELS, MOST_PROMPTS = 8, 200


@dataclass(frozen=True)
class Source:
    """A student of a lineup with one step count."""

    folder: Path
    card: StudentCard
    steps: int
    hub: str = ""  # its id, of a student of the hub

    @property
    def run(self) -> Path:
        """The run around the student's folder, or the folder itself."""
        return self.folder.parent if self.folder.name == "final" else self.folder


def sources_of(given: Sequence[str]) -> list[Source]:
    """Return the students that were named as `RUN` or `RUN@STEPS`.

    Raises ValueError for what is no student, for a step count that its student does not serve, and for a
    student that is named twice.
    """
    if len(given) > MOST_MODELS:
        raise ValueError(f"RUN: got {len(given)} students, allowed are up to {MOST_MODELS}; name fewer")
    found = [_source(text) for text in given]
    for i, one in enumerate(found):
        if any((other.folder.resolve(), other.steps) == (one.folder.resolve(), one.steps) for other in found[:i]):
            raise ValueError(f"RUN: got {visible(given[i], lines=False)} twice; name each student once")
    return found


def _source(text: str) -> Source:
    path, at, steps = text.rpartition("@")
    named = bool(at) and steps.isdecimal() and not Path(expanded(text)).exists()
    own = expanded(path if named else text)
    folder = require_folder(own, "RUN")
    card = read_card(folder)
    count = int(steps) if named else card.steps[0]
    if count not in card.steps:
        raise ValueError(f"RUN: got {text}, this student serves {', '.join(map(str, card.steps))} steps; choose one")
    return Source(folder, card, count, own if on_hub(own) else "")


def names_of(sources: Sequence[Source]) -> list[str]:
    """Return a short name for every student.

    The name of its run, with as many folders above as tell it from the others, and its steps.
    """
    parts = [tuple(s.hub.split("/")) if s.hub else s.run.resolve().parts[1:] for s in sources]

    def tail(own: tuple[str, ...]) -> str:
        others = [p for p in parts if p != own]
        deep = next((n for n in range(1, len(own)) if all(own[-n:] != p[-n:] for p in others)), len(own))
        return "/".join(own[-deep:])

    return [f"{tail(own)}, {plural(source.steps, 'step')}" for own, source in zip(parts, sources, strict=True)]


def bases_of(sources: Sequence[Source]) -> list[str]:
    """Return the different base models of students.

    Two bases of one name with other weights are two.
    """
    found = {(source.card.base, source.card.base_hash) for source in sources}
    twice = len({name for name, _ in found}) < len(found)
    return sorted(f"{name} ({weights})" if twice else name for name, weights in found)


def wished_prompts(option: str) -> int | list[str]:
    """Return what `--prompts` asks for.

    A number, or the prompts of a file. Raises ValueError.
    """
    if option.isdecimal():
        if not 1 <= (count := int(option[:9])) <= MOST_PROMPTS:
            raise ValueError(f"--prompts: got {option}, allowed are 1 to {MOST_PROMPTS}, or a prompt file")
        return count
    with in_options({"prompts": "--prompts"}):
        found = find_prompts(expanded(option))[0]
    if len(found) > MOST_PROMPTS:
        raise ValueError(
            f"--prompts: {visible(option, lines=False)} has {len(found)}, allowed are up to {MOST_PROMPTS}; "
            "write a shorter one"
        )
    return found


def asked_prompts(source: Source, teacher: Backbone, wished: int | Sequence[str]) -> list[str]:
    """Return what the models of a lineup sample, in this order.

    A number is that of the prompts of the source's run, of those kept out
    of the training where there are some. A number of images of a model without prompts, or
    with few classes, repeats those. Raises ValueError.
    """
    if not isinstance(wished, int):
        return list(wished)
    if not teacher.encode([""]):
        own = [""]
    elif isinstance(teacher, PixelModel):
        own = list(teacher.labels)
    else:
        split = own_split(teacher, source.run)
        own = sorted(set(split.held_out or split.trained), key=digest)
    return [own[i % len(own)] for i in range(wished)]


@dataclass(frozen=True)
class Lineup:
    """What the models of a lineup sampled, students first."""

    shots: Shots
    drawn: tuple[Drawn, ...]

    @property
    def identity(self) -> str:
        """What tells the lineup from another: models, prompts and seeds."""
        return digest([[asdict(d.entry) for d in self.drawn], self.shots.prompts, self.shots.seeds])


def draw_lineup(
    sources: Sequence[Source], wished: int | Sequence[str], teacher: bool, base: str | None, cache: Path
) -> Lineup:
    """Sample with every student and with their teacher.

    One model after the other. The weights of a base are loaded once. Students of several bases have a
    teacher each. Shows progress; what is kept in `cache` is not sampled again.
    """
    students, teachers, shots = list[Drawn](), dict[str, Drawn](), Shots((), ())
    loaded: dict[tuple[str, Size, str], Backbone] = {}
    for source, name in zip(sources, names_of(sources), strict=True):
        card = source.card
        kind = (base or card.base, card.size, card.dtype)
        student = open_student(source.folder, loaded.get(kind, base))
        check_steps(student, source.steps, "RUN")
        own = loaded[kind] = student.backbone if student.base is None else student.base
        shots = shots if shots.prompts else _shots(source, own, wished)
        weights = fingerprint(own.module)
        known, theirs = digest([asdict(card), weights]), digest([weights, asdict(card.guidance), card.size])
        entry = Entry(name, "student", kind[0], source.steps, 1.0, card_nfe(card, source.steps), known, theirs)
        students.append(_drawn(entry, student, Guidance(), shots, cache))
        if teacher and theirs not in teachers:
            null = own.encode([""])
            scale = card.guidance if null else Guidance()
            cost = total_nfe(TEACHER_STEPS, nfe_per_step(null, scale))
            label = teacher_name(kind[0], scale)
            entry = Entry(label, "teacher", kind[0], TEACHER_STEPS, scale.scale, cost, theirs, theirs)
            teachers[theirs] = _drawn(entry, own, scale, shots, cache)
    return Lineup(shots, (*students, *teachers.values()))


def teacher_name(base: str, guidance: Guidance) -> str:
    """Return what a teacher is called.

    `teacher emoji, 50 steps, guidance 4.5`.
    """
    told = f", guidance {guidance.scale:g}" if guidance.active else ""
    return f"teacher {' + '.join(source_of(base).names)}, {plural(TEACHER_STEPS, 'step')}{told}"


def _shots(source: Source, teacher: Backbone, wished: int | Sequence[str]) -> Shots:
    asked = asked_prompts(source, teacher, wished)
    teacher.encode(sorted(set(asked)))  # classes that there are not are named before anything is sampled
    return shots_of(list(dict.fromkeys(asked)), len(asked))


def _drawn(entry: Entry, model: Backbone | Student, guidance: Guidance, shots: Shots, cache: Path) -> Drawn:
    """Sample with one model, with a bar of its images."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=entry.steps, guidance=guidance)

    left = missing(cache, entry, shots)
    if not left:
        return drawn(entry, draw, shots, cache, lambda count: None)
    with meter(f"{entry.name}: images", len(shots.prompts)) as bar:
        return drawn(entry, draw, shots, cache, lambda count: bar.advance(bar.done + count, {}))


def stacked(lineup: Lineup) -> list[Tensor]:
    """Return the images of every model in one size.

    The size is the largest, the values are in [0, 1]. Images `[N, 3, H, W]` or clips `[N, F, 3, H, W]`.
    Raises ValueError where some are images and others clips.
    """
    found = [d.unit for d in lineup.drawn]
    if len({(x.ndim, x.shape[1] if x.ndim == 5 else 0) for x in found}) > 1:
        raise ValueError("RUN: some students sample images, or clips of another length; compare those of one kind")
    size = tuple(max(x.shape[d] for x in found) for d in (-2, -1))
    return [x if x.shape[-2:] == size else _resized(x, size) for x in found]


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    flat = torch.nn.functional.interpolate(images.flatten(0, -4), size, mode="bicubic", antialias=True)
    return flat.clamp(0, 1).unflatten(0, images.shape[:-3])
