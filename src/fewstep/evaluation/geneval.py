"""Rules of GenEval: whether an image shows what its prompt names.

Pure functions of what a detector found: presence, number, colour and position (Ghosh et al., arXiv:2310.11513). The
prompts' rules ship as `zoo/prompts/geneval.jsonl`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reading import reading, text_in
from .prompt_lists import FOLDER

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SURE, SURE_OF_NUMBER = 0.3, 0.9  # least score of an object, and where objects are counted
MOST = 16  # objects of a class
GAP = 0.1  # of the two objects' sizes together, within which they are at one place
SLANT = 0.5  # least share of the distance that is to the side, or up or down
NOWHERE = 1e-3  # pixels
# COCO's classes in their order, as the prompts call them.
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Detection:
    """One object that a detector found.

    `mask` [H, W] says which pixels are its own.
    """

    name: str
    score: float
    box: Box
    mask: Tensor | None = None


@dataclass(frozen=True)
class Clause:
    """What a prompt says of one class.

    At least `number` objects `name`, each in the `colour` and at the `place` seen from the objects of clause `of`;
    both may be empty. As an exclusion: fewer than `number`.
    """

    name: str
    number: int
    colour: str = ""
    place: str = ""
    of: int = 0


@dataclass(frozen=True)
class Rule:
    """What a prompt asks for."""

    task: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def read_rules() -> dict[str, Rule]:
    """Read the rule of each of GenEval's prompts.

    Raises ReadError where the file is missing or damaged.
    """
    file = FOLDER / "geneval.jsonl"
    with reading(f"rules {file}:", "install fewstep again", "cannot be used"):
        rows = [json.loads(line) for line in text_in(file).splitlines()]
        return {
            str(row["prompt"]): Rule(
                str(row["tag"]),
                tuple(_clause(asked) for asked in row["include"]),
                tuple(_clause(asked) for asked in row.get("exclude", ())),
            )
            for row in rows
        }


def _clause(asked: Mapping[str, Any]) -> Clause:
    place, of = asked.get("position", ("", 0))
    return Clause(str(asked["class"]), int(asked["count"]), str(asked.get("color", "")), str(place), int(of))


def counted(found: Sequence[Detection], rule: Rule) -> dict[str, list[Detection]]:
    """Return the objects of each class that count, the surest first."""
    least, of = SURE_OF_NUMBER if rule.task == "counting" else SURE, dict[str, list[Detection]]()
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > least:
            of.setdefault(one.name, []).append(one)
    return {name: several[:MOST] for name, several in of.items()}


def places(a: Box, b: Box) -> frozenset[str]:
    """Return where box a is, seen from box b.

    Any of `left of`, `right of`, `above`, `below`. The centres' distance is shortened by `GAP` of both boxes' width
    and height; a direction counts where it is more than `SLANT` of the whole distance.
    """
    first, second = (torch.tensor(box, dtype=torch.float64).view(2, 2) for box in (a, b))
    apart = first.mean(0) - second.mean(0)
    sizes = (first[1] - first[0]).abs() + (second[1] - second[0]).abs()
    left = (apart.abs() - GAP * sizes).clamp(min=0) * apart.sign()
    if bool((left.abs() < NOWHERE).all()):
        return frozenset()
    x, y = (left / apart.norm()).tolist()
    named = {"left of": x < -SLANT, "right of": x > SLANT, "above": y < -SLANT, "below": y > SLANT}
    return frozenset(name for name, there in named.items() if there)


def fulfils(
    objects: Mapping[str, Sequence[Detection]],
    rule: Rule,
    colours: Callable[[Sequence[Detection]], Sequence[str]],
) -> bool:
    """Return whether an image shows what a rule asks for.

    `objects` are those of `counted`; of each class the surest ones are looked at. `colours` names the colour of each
    of some objects of one class.
    """
    groups: list[Sequence[Detection]] = []
    for asked in rule.include:
        group = objects.get(asked.name, ())[: asked.number]
        if len(group) < asked.number:
            return False
        if asked.colour and any(colour != asked.colour for colour in colours(group)):
            return False
        if asked.place and any(asked.place not in places(a.box, b.box) for a in group for b in groups[asked.of]):
            return False
        groups.append(group)
    return all(len(objects.get(asked.name, ())) < asked.number for asked in rule.exclude)
