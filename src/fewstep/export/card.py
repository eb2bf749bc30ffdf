"""`fewstep.json`: everything a student needs to be used right, beside its weights. Versioned; nothing else is authoritative."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.solvers import SOLVERS, STOCHASTIC, evaluations
from ..hashes import LISTING
from ..names import read_name
from ..reading import object_in, reading
from ..trajp.head import KINDS
from ..typed import shown, typed

FORMAT = 1
FILE = LISTING
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("lora", "full", "none")


@dataclass(frozen=True)
class StudentCard:
    """What a student is. The first of `steps` is the default, and the one that its weights alone are right for. `timesteps` and `solver` per step count, as strings of the count (JSON keys); guidance is `baked`."""

    name: str
    method: str
    base: str
    base_hash: str
    steps: tuple[int, ...]
    timesteps: dict[str, list[float]]
    solver: dict[str, str]
    prediction: str
    weights: str  # lora | full | none, with a head alone
    rank: int | None
    alpha: float | None
    teacher_guidance: float
    licence: str
    iterations: int
    train_seconds: float
    hardware: str
    version: str
    guidance: str = "baked"
    guidance_rescale: float = 0.0  # of the teacher
    guidance_parallel: float = 1.0  # of what it was taught, see backbones.base.projected
    head: str = ""  # the kind of head that corrects its direction; empty for none
    free_first: bool = False  # whether its first direction is taken without the network
    scales: tuple[float, ...] = ()  # guidance scales that it is told apart, the default first; empty where guidance is baked
    dtype: str = "float32"  # of the base it was trained on, and is read onto
    size: int = 0  # of its pictures, where it is another than the base's
    data: str = "prompts alone"  # what the student was trained from
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of the weight files beside it, compared when they are read
    time_layer: str = ""  # where a student of several step counts is told its own; empty for all others
    own_network: str = ""  # the class of a network of one's own that it was made from, which a file cannot bring; empty for pipelines
    sigma_data: float = 0.0  # of such a network's `edm` prediction; 0 for all others
    schedule: dict[str, Any] = field(default_factory=dict)  # of such a network, as data: see `backbones.process.schedule_data`
    shape: tuple[int, ...] = ()  # of one state of such a network
    conditions: dict[str, Any] = field(default_factory=dict)  # what it hears of the empty prompt: see `backbones.process.probe`
    format: int = FORMAT

    @property
    def told(self) -> tuple[float, ...]:
        """What it is told apart by, where it has a time layer for that: guidance scales or step counts."""
        return self.scales or self.steps


def card_evaluations(card: StudentCard, steps: int) -> int:
    """Network evaluations of one picture in so many steps; a head costs none."""
    return evaluations(steps, free=card.free_first)


def counted(card: StudentCard) -> str:
    """The network calls of every step count that it serves: `4 in 4 steps, 2 in 2 steps`."""
    free = " (the first step is free)" if card.free_first else ""
    return ", ".join(f"{card_evaluations(card, k)} in {k} step{'s' if k > 1 else ''}" for k in card.steps) + free


def read_card(folder: Path) -> StudentCard:
    """The card of a student folder. Raises ValueError with one line when there is none, it is of another format, or holds what no student has."""
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"student: {folder} has no {FILE}; pass the final/ folder of a run")
    with reading(f"student: {path}", "export the run again"):
        value = object_in(path)
        if "format" not in value:
            raise ValueError("it lacks its format")
    if type(value["format"]) is not int or value["format"] != FORMAT:
        raise ValueError(
            f"student: {path} has format {shown(value['format'])}, this version reads {FORMAT}; install the fewstep that wrote it"
        )
    name = read_name(value.get("name"), f"student: {path}: name")
    with reading(f"student: {path}", "export the run again", f"does not fit format {FORMAT}"):
        card: StudentCard = typed(StudentCard, {**value, "name": name})
        _require_sound(card)
    return card


def _require_sound(card: StudentCard) -> None:
    """Raises ValueError that names the field for values that no student has."""
    counts = {str(k) for k in card.steps}
    for field_name, holds, allowed in (
        ("steps", card.steps and min(card.steps) > 0 and len(counts) == len(card.steps), "different whole numbers from 1"),
        ("timesteps", set(card.timesteps) == counts, "those of every step count"),
        ("solver", set(card.solver) == counts, "that of every step count"),
        ("solver", all(s in SOLVERS or s in STOCHASTIC for s in card.solver.values()), f"{', '.join([*SOLVERS, *STOCHASTIC])}"),
        ("weights", card.weights in WEIGHTS, ", ".join(WEIGHTS)),
        ("rank", card.weights != "lora" or (card.rank is not None and card.rank > 0), "a whole number from 1"),
        ("alpha", card.weights != "lora" or (card.alpha is not None and 0 < card.alpha < math.inf), "a number above 0"),
        ("head", card.head in ("", *KINDS), f"empty, {', '.join(KINDS)}"),
        ("weights", card.weights != "none" or card.head != "", "lora or full where there is no head"),
        ("guidance_rescale", 0 <= card.guidance_rescale <= 1, "numbers from 0 to 1"),
        ("guidance_parallel", 0 <= card.guidance_parallel <= 1, "numbers from 0 to 1"),
        ("teacher_guidance", math.isfinite(card.teacher_guidance), "finite numbers"),
        ("train_seconds", 0 <= card.train_seconds < math.inf, "numbers from 0"),
        ("iterations", card.iterations >= 0, "whole numbers from 0"),
        ("scales", all(math.isfinite(w) for w in card.scales) and len(set(card.scales)) == len(card.scales), "different finite numbers"),
        ("size", card.size >= 0, "whole numbers from 0"),
        ("shape", all(n > 0 for n in card.shape), "whole numbers from 1"),
        ("dtype", card.dtype in DTYPES, ", ".join(DTYPES)),
        ("sigma_data", 0 <= card.sigma_data < math.inf, "numbers from 0"),
        ("base", card.base.strip() != "", "the name of a teacher"),
        ("scales", not card.scales or card.time_layer != "", "none where there is no time_layer"),
    ):
        if not holds:
            raise ValueError(f"its {field_name} is {str(getattr(card, field_name))[:60]!r}, allowed are {allowed}")
    for count, times in card.timesteps.items():
        if len(times) != int(count) + 1 or not all(math.isfinite(t) for t in times) or sorted(set(times), reverse=True) != times:
            raise ValueError(f"its timesteps of {count} steps are no {int(count) + 1} falling numbers")
