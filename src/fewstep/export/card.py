"""`fewstep.json`: everything a student needs to be used right, beside its weights. Versioned; nothing else is authoritative."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.solvers import evaluations
from ..hashes import LISTING
from ..names import read_name

FORMAT = 1
FILE = LISTING
DTYPES = ("float32", "bfloat16", "float16")


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
    """The card of a student folder. Raises ValueError with one line when there is none or it is of another format."""
    path = folder / FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"student: {folder} has no {FILE}; pass the final/ folder of a run") from error
    except ValueError as error:
        raise ValueError(f"student: {path} is damaged ({error}); export the run again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else value
        raise ValueError(f"student: {path} has format {found}, this version reads {FORMAT}; install the fewstep that wrote it")
    try:
        card = StudentCard(**value)
    except TypeError as error:
        raise ValueError(f"student: {path} does not fit format {FORMAT} ({error}); export the run again") from error
    if card.dtype not in DTYPES:
        raise ValueError(f"student: {path} has dtype {card.dtype!r}, allowed are {', '.join(DTYPES)}; export the run again")
    name = read_name(card.name, f"student: {path}: name")
    return StudentCard(
        **{**asdict(card), "name": name, "steps": tuple(card.steps), "scales": tuple(card.scales), "shape": tuple(card.shape)}
    )
