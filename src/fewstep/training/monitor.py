"""Is the student drifting? Statistics of its pictures beside the teacher's, on the same prompts and seeds.

Losses of distribution matching say little; brightness, colour, contrast and variety of the pictures say it early.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNSEEN = 0.005  # of the range of a picture, about a grey level of 8 bits: grey pictures have no saturation, one prompt has no variety


@dataclass(frozen=True)
class Look:
    """Statistics of pictures [P, 3, H, W] in [0, 1], each a number: means over pictures, variety across prompts."""

    brightness: float
    saturation: float
    contrast: float
    variety: float


def look(pictures: Tensor) -> Look:
    """`variety` is the mean distance between pictures of different prompts, per pixel: it falls when modes are lost."""
    x = pictures.float()
    flat = x.flatten(1)
    variety = torch.pdist(flat).mean() / flat.shape[1] ** 0.5 if len(x) > 1 else torch.zeros(())
    return Look(
        brightness=float(x.mean()),
        saturation=float((x.amax(1) - x.amin(1)).mean()),
        contrast=float(x.mean(1).flatten(1).std(1).mean()),
        variety=float(variety),
    )


def drift(student: Look, teacher: Look, tolerance: float = 0.35) -> list[str]:
    """One line of advice for every statistic that has left the teacher's by more than `tolerance`, relative, and by more than can be seen."""
    advice = {
        "brightness": "lower method.guidance or train.lr",
        "saturation": "lower method.guidance or train.lr",
        "contrast": "blurred or over-sharpened: raise method.fake_updates or lower train.lr",
        "variety": "modes are being lost: lower train.lr, raise train.fake_lr or method.fake_updates",
    }
    found = []
    for name, cure in advice.items():
        own, reference = getattr(student, name), getattr(teacher, name)
        if not math.isfinite(own):
            return [
                f"DRIFT {name} is {own}: the student's pictures are not finite; stop the run, lower train.lr, or set train.precision to no"
            ]
        if not abs(own - reference) <= max(tolerance * reference, UNSEEN):
            found.append(f"DRIFT {name} is {own / max(reference, UNSEEN):.2f} of the teacher's; {cure}")
    return found
