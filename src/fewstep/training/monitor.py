"""Drift of the student: statistics of previews next to the teacher's.

Student and teacher previews have the same prompts and seeds. Losses of distribution matching say little;
brightness, colour, contrast, variety and motion of the images show problems early. Guidance that is too high
shows in the states that the images are decoded from: an autoencoder decodes states with four times the normal
spread to images of ordinary brightness and colour.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of an image's range, about one grey level of 8 bits: grey images have no saturation, and one prompt
# has no variety.
UNSEEN = 0.005
STANDING = 0.001  # mean change from frame to frame, as a share of the range; clips with less stand still
STILL = 0.1  # share of the teacher's motion; a clip with less does not move as the teacher's does
TOLERANCE = 0.35
MODERATE = 4.5  # guidance at which images are not blown out

ADVICE = {
    "brightness": "lower method.guidance or train.lr",
    "saturation": "lower method.guidance or train.lr",
    "contrast": "blurred or over-sharpened: raise method.fake.updates or lower train.lr",
    "variety": "modes are being lost: lower train.lr, raise train.fake_lr or method.fake.updates",
    "spread": "blown out if above 1, faded if below: lower method.guidance or train.lr",
    "motion": (
        "clips stand still if below 1, flicker if above: lower train.lr, raise train.fake_lr or method.fake.updates"
    ),
}


@dataclass(frozen=True)
class ImageStats:
    """Statistics of P previews.

    Means over images; `variety` across prompts; `spread` of the states that the images are decoded from.
    `blank` is true for each image that is not finite, or of one colour. `motions` of each clip are shares of
    an image's range; empty for images.
    """

    brightness: float
    saturation: float
    contrast: float
    variety: float
    spread: float
    motion: float
    blank: tuple[bool, ...]
    motions: tuple[float, ...]


def look(images: Tensor, states: Tensor | None = None, motions: Tensor | None = None) -> ImageStats:
    """Return the statistics of previews.

    The previews are images [P, 3, H, W] or clips [P, F, 3, H, W] in [0, 1], with the `states` [P, ...] that
    they were decoded from, and the `motions` [P] of clips. `variety` is the mean distance between images of
    different prompts, per pixel, which falls when modes are lost. Spread and motion are 0 without the
    argument.
    """
    x = images.detach().float().cpu()
    flat = x.flatten(1)
    variety = torch.pdist(flat).mean() / flat.shape[1] ** 0.5 if len(x) > 1 else torch.zeros(())
    one_colour = (x.movedim(-3, 1).flatten(2).std(2, correction=0) <= UNSEEN).all(1)
    moved = torch.zeros(0) if motions is None else motions.detach().float().cpu()
    return ImageStats(
        brightness=float(x.mean()),
        saturation=float((x.amax(-3) - x.amin(-3)).mean()),
        contrast=float(x.mean(-3).flatten(1).std(1).mean()),
        variety=float(variety),
        spread=0.0 if states is None else float(states.detach().float().std()),
        motion=float(moved.mean()) if len(moved) else 0.0,
        blank=tuple((one_colour | ~flat.isfinite().all(1)).tolist()),
        motions=tuple(moved.tolist()),
    )


def drift(
    student: ImageStats,
    teacher: ImageStats,
    start: ImageStats | None = None,
    named: str = "the teacher's",
    where: str = "",
) -> list[str]:
    """Return one line of advice for every drifted statistic.

    `where` names the previews. A statistic has drifted if the difference from the teacher exceeds `TOLERANCE`
    (relative), is visible, and exceeds the difference at the `start`: a student of one step starts blurred. A
    statistic that is not a number has drifted.
    """
    found = []
    for name, cure in ADVICE.items():
        own, reference = getattr(student, name), getattr(teacher, name)
        floor = STANDING if name == "motion" else UNSEEN
        limit = max(TOLERANCE * abs(reference), floor)
        if start is not None and math.isfinite(begun := abs(getattr(start, name) - reference)):
            limit = max(limit, begun + floor)
        if not (abs(own - reference) <= limit < math.inf):
            found.append(f"DRIFT {name} is {own / max(reference, floor):.2f} of {named}{where}; {cure}")
    if blank := sum(own and not theirs for own, theirs in zip(student.blank, teacher.blank, strict=True)):
        cure = "lower train.lr and train.fake_lr, or set train.precision=no"
        found.append(f"DRIFT {blank} of {len(student.blank)} previews are of one colour or not finite{where}; {cure}")
    pairs = list(zip(student.motions, teacher.motions, strict=True))
    if still := sum(theirs > STANDING and own < STILL * theirs for own, theirs in pairs):
        found.append(f"DRIFT {still} of {len(pairs)} clips stand still where {named} move{where}; {ADVICE['motion']}")
    return found


def unfit(teacher: ImageStats, moderate: ImageStats | None, guidance: float) -> list[str]:
    """Return what is wrong with the teacher's own previews.

    A student would learn these faults. `moderate` are the teacher's previews at guidance `MODERATE`.
    """
    found = []
    if blank := sum(teacher.blank):
        found.append(
            f"DRIFT {blank} of the teacher's own {len(teacher.blank)} previews are of one colour or not finite; "
            "check that the teacher samples well: fewstep sample TEACHER"
        )
    if moderate is not None:
        own = f", in the teacher's own previews at method.guidance={guidance:g}"
        found += drift(teacher, moderate, named=f"what it is at guidance {MODERATE:g}", where=own)
    return found
