"""`fewstep.json`: everything a student needs to be used right, beside its weights. Versioned; nothing else is authoritative."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.guidance import Guidance
from ..core.solvers import SOLVERS, total_nfe
from ..heads.head import KINDS

FORMAT = 2
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("lora", "full", "none")


@dataclass(frozen=True)
class StudentCard:
    """What a student is. The first of `steps` is the default, and the one that its weights alone are right for. `timesteps` and `solver` per step count, as strings of the count (JSON keys)."""

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
    guidance: Guidance  # of the teacher, baked into the student
    licence: str
    iterations: int
    train_seconds: float
    hardware: str
    version: str
    head: str = ""  # the kind of head that corrects its direction; empty for none
    analytic_first_step: bool = False  # without a network call
    guidance_scales: tuple[
        float, ...
    ] = ()  # that it is conditioned on, the default first; empty where guidance is baked in
    dtype: str = "float32"  # of the base it was trained on, and is read onto
    size: int = 0  # of its pictures, where it is another than the base's
    data: str = "prompts alone"  # what the student was trained from
    files: dict[str, str] = field(
        default_factory=dict
    )  # SHA-256 of the weight files beside it, compared when they are read
    time_layer: str = ""  # where a student of several step counts is told its own; empty for all others
    own_network: str = (
        ""  # the class of a network of one's own that it was made from, which a file cannot bring; empty for pipelines
    )
    sigma_data: float = 0.0  # of such a network's `edm` prediction; 0 for all others
    schedule: dict[str, Any] = field(
        default_factory=dict
    )  # of such a network, as data: see `backbones.process.schedule_data`
    shape: tuple[int, ...] = ()  # of one state of such a network
    conditions: dict[str, Any] = field(
        default_factory=dict
    )  # what it hears of the empty prompt: see `backbones.process.probe`
    format: int = FORMAT

    @property
    def condition_values(self) -> tuple[float, ...]:
        """Values that it is conditioned on, where it has a time layer for that: guidance scales or step counts."""
        return self.guidance_scales or self.steps


def card_nfe(card: StudentCard, steps: int) -> int:
    """Network evaluations of one picture in so many steps; a head costs none."""
    return total_nfe(steps, analytic=card.analytic_first_step)


def counted(card: StudentCard) -> str:
    """The network calls of every step count that it serves: `4 in 4 steps, 2 in 2 steps`."""
    free = " (the first step is free)" if card.analytic_first_step else ""
    return ", ".join(f"{card_nfe(card, k)} in {k} step{'s' if k > 1 else ''}" for k in card.steps) + free


def guidance_text(card: StudentCard) -> str:
    """Return the teacher's guidance in words: `scale 7.5, rescale 0.7`."""
    plain = asdict(Guidance())
    return ", ".join(f"{k} {v:g}" for k, v in asdict(card.guidance).items() if k == "scale" or v != plain[k])


def from_format_1(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a card of fewstep 0.1.0 under their names of today."""
    defaults = {"teacher_guidance": 1.0, "guidance_rescale": 0.0, "guidance_parallel": 1.0}
    scale, rescale, eta = (value.get(k, default) for k, default in defaults.items())
    old = ("teacher_guidance", "guidance_rescale", "guidance_parallel", "guidance")
    renamed = {"free_first": "analytic_first_step", "scales": "guidance_scales"}
    kept = {renamed.get(k, k): v for k, v in value.items() if k not in old}
    return {**kept, "guidance": {"scale": scale, "apg_eta": eta, "rescale": rescale}, "format": FORMAT}


def require_sound(card: StudentCard) -> None:
    """Raises ValueError that names the field for values that no student has."""
    counts = {str(k) for k in card.steps}
    for field_name, holds, allowed in (
        (
            "steps",
            card.steps and min(card.steps) > 0 and len(counts) == len(card.steps),
            "different whole numbers from 1",
        ),
        ("timesteps", set(card.timesteps) == counts, "those of every step count"),
        ("solver", set(card.solver) == counts, "that of every step count"),
        ("solver", all(s in SOLVERS for s in card.solver.values()), ", ".join(SOLVERS)),
        ("weights", card.weights in WEIGHTS, ", ".join(WEIGHTS)),
        ("rank", card.weights != "lora" or (card.rank is not None and card.rank > 0), "a whole number from 1"),
        ("alpha", card.weights != "lora" or (card.alpha is not None and 0 < card.alpha < math.inf), "a number above 0"),
        ("head", card.head in ("", *KINDS), f"empty, {', '.join(KINDS)}"),
        ("weights", card.weights != "none" or card.head != "", "lora or full where there is no head"),
        ("train_seconds", 0 <= card.train_seconds < math.inf, "numbers from 0"),
        ("iterations", card.iterations >= 0, "whole numbers from 0"),
        (
            "guidance_scales",
            all(math.isfinite(w) for w in card.guidance_scales)
            and len(set(card.guidance_scales)) == len(card.guidance_scales),
            "different finite numbers",
        ),
        ("size", card.size >= 0, "whole numbers from 0"),
        ("shape", all(n > 0 for n in card.shape), "whole numbers from 1"),
        ("dtype", card.dtype in DTYPES, ", ".join(DTYPES)),
        ("sigma_data", 0 <= card.sigma_data < math.inf, "numbers from 0"),
        ("base", card.base.strip() != "", "the name of a teacher"),
        ("guidance_scales", not card.guidance_scales or card.time_layer != "", "none where there is no time_layer"),
    ):
        if not holds:
            raise ValueError(f"its {field_name} is {str(getattr(card, field_name))[:60]!r}, allowed are {allowed}")
    for count, times in card.timesteps.items():
        if (
            len(times) != int(count) + 1
            or not all(math.isfinite(t) for t in times)
            or sorted(set(times), reverse=True) != times
        ):
            raise ValueError(f"its timesteps of {count} steps are no {int(count) + 1} falling numbers")
