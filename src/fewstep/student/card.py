"""`fewstep.json`: everything that is needed to use a student right.

The card lies next to the student's weights and is versioned. No other file is authoritative.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backbones.sizes import sound_size
from ..core.guidance import Guidance
from ..core.solvers import SOLVERS, total_nfe
from ..heads.head import KINDS

FORMAT = 2
DTYPES = ("float32", "bfloat16", "float16")
BASE_DTYPES = (*DTYPES, "float64")  # the last of networks of one's own
WEIGHTS = ("lora", "full", "none")


@dataclass(frozen=True)
class StudentCard:
    """What a student is.

    The first of `steps` is the default, and the step count for which the weights alone are right.
    `timesteps` and `solver` are given per step count, under the count as a string (JSON keys).
    """

    name: str
    method: str
    base: str
    base_hash: str
    steps: tuple[int, ...]
    timesteps: dict[str, list[float]]
    solver: dict[str, str]
    prediction: str
    weights: str  # lora | full | none (a head alone)
    rank: int | None
    alpha: float | None
    guidance: Guidance  # of the teacher, baked into the student
    licence: str
    iterations: int
    train_seconds: float
    hardware: str
    version: str
    head: str = ""  # the kind of head that corrects the direction; empty for none
    analytic_first_step: bool = False  # the first step costs no NFE
    # Guidance scales that the student is conditioned on, the default first; empty where guidance is baked in.
    guidance_scales: tuple[float, ...] = ()
    dtype: str = "float32"  # of the base that the student was trained on and is read onto
    size: int | str = 0  # of the images or videos, where not the base's (see `backbones.sizes`)
    data: str = "prompts alone"  # what the student was trained from
    # SHA-256 of the weight files next to the card, compared when the files are read.
    files: dict[str, str] = field(default_factory=dict)
    # The layer that conditions the student on one of `condition_values`; empty for a student without conditions.
    time_layer: str = ""
    # Whether each step has weights of its own, in a folder for each; see `folder.step_folders`.
    per_step: bool = False
    # The class of a network of one's own, which a file cannot bring; empty for pipelines. The fields below
    # describe such a network.
    own_network: str = ""
    sigma_data: float = 0.0  # of the `edm` prediction; 0 for all others
    schedule: dict[str, Any] = field(default_factory=dict)  # see `backbones.process.schedule_data`
    shape: tuple[int, ...] = ()  # of one state
    conditions: dict[str, Any] = field(default_factory=dict)  # of the empty prompt, see `backbones.process.probe`
    format: int = FORMAT

    @property
    def condition_values(self) -> tuple[float, ...]:
        """The values that the student is conditioned on.

        With a time layer for the condition, these are guidance scales or step counts.
        """
        return self.guidance_scales or self.steps


def card_nfe(card: StudentCard, steps: int) -> int:
    """Return the NFE of one image in so many steps.

    A head costs none, and neither does an analytic first step.
    """
    return total_nfe(steps, analytic=card.analytic_first_step)


def step_card(card: StudentCard, step: int) -> StudentCard:
    """Return the card of one step's weights, from 0.

    Where each step has weights of its own, its name says which step's they are: `NAME-step1of4`.
    """
    return replace(card, name=f"{card.name}-step{step + 1}of{card.steps[0]}") if card.per_step else card


def first_times(card: StudentCard) -> Tensor:
    """Return the times at which the default student calls its network.

    [K] in float64, without clean data.
    """
    return torch.tensor(card.timesteps[str(card.steps[0])][:-1], dtype=torch.float64)


def counted(card: StudentCard) -> str:
    """Return the NFE of every step count, in words.

    `4 in 4 steps, 2 in 2 steps`.
    """
    free = " (the first step is free)" if card.analytic_first_step else ""
    return ", ".join(f"{card_nfe(card, k)} in {k} step{'s' if k > 1 else ''}" for k in card.steps) + free


def guidance_text(card: StudentCard) -> str:
    """Return the teacher's guidance in words: `scale 7.5, rescale 0.7`."""
    plain = asdict(Guidance())
    return ", ".join(f"{k} {v:g}" for k, v in asdict(card.guidance).items() if k == "scale" or v != plain[k])


def from_format_1(value: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a fewstep 0.1.0 card to today's names."""
    defaults = {"teacher_guidance": 1.0, "guidance_rescale": 0.0, "guidance_parallel": 1.0}
    scale, rescale, eta = (value.get(k, default) for k, default in defaults.items())
    old = ("teacher_guidance", "guidance_rescale", "guidance_parallel", "guidance")
    renamed = {"free_first": "analytic_first_step", "scales": "guidance_scales"}
    kept = {renamed.get(k, k): v for k, v in value.items() if k not in old}
    return {**kept, "guidance": {"scale": scale, "apg_eta": eta, "rescale": rescale}, "format": FORMAT}


def require_sound(card: StudentCard) -> None:
    """Check that a card holds values that a student can have.

    Raises ValueError that names the field.
    """
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
        (
            "per_step",
            not card.per_step
            or (
                len(card.steps) == 1
                and card.steps[0] > 1
                and card.weights != "none"
                and not (card.head or card.analytic_first_step or card.time_layer or card.guidance_scales)
            ),
            "true for weights of one step count from 2, without head, condition and analytic first step",
        ),
        ("size", sound_size(card.size), "whole numbers from 0, or width, height and frames such as 832x480x81"),
        ("shape", all(n > 0 for n in card.shape), "whole numbers from 1"),
        ("dtype", card.dtype in BASE_DTYPES, ", ".join(BASE_DTYPES)),
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
