"""How a run is initialized: networks, head and initial student.

A run starts from the teacher, or continues a finished student.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..backbones.base import EMBEDDED, Backbone
from ..backbones.experts import Experts
from ..backbones.modules import dtype_of
from ..data.trajectories import Trajectories
from ..heads.head import Head, facts_of, kind_of, make_head, require_steps, unknown
from ..methods.method import Method, require_initial_student
from ..methods.per_step import require_per_step
from ..roles.adapters import plain_layers
from ..roles.roles import Roles, RolesConfig, make_roles
from ..student.base import require_own
from ..student.card import StudentCard
from ..student.folder import read_card, read_head, read_lora, read_parts, step_folders
from . import foreign
from .foreign import is_foreign, require_fitting


def roles_for(
    teacher: Backbone,
    method: Method,
    config: RolesConfig,
    seed: int = 0,
    paths: Trajectories | None = None,
    init_from: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_meta: bool = False,
) -> Roles:
    """Return the networks that a method needs.

    The student is initialized from the finished student in `init_from`, or from a file of other people, of which `say`
    is told what is kept; by default from the teacher. A new
    head is fitted to the trajectories `paths`; without trajectories the head knows nothing of the data,
    which is enough for a memory plan. `on_meta`: see `make_roles`.

    Raises ValueError for a teacher in float16, and where `init_from` does not fit.
    """
    if dtype_of(teacher.module) == torch.float16:
        raise ValueError(
            "dtype: got float16, whose range loses the gradients of a training; load the teacher in bfloat16 or float32"
        )
    require_per_step(method, config)
    head = _head(method, teacher, seed, paths, init_from)
    if config.per_step:
        _require_one_network(teacher, head)
    gan_step_counts = method.counts if method.needs.adversary else ()
    # A head alone sees the times themselves and needs no condition.
    values = method.condition_values if config.rank or not config.lora else ()
    kept, to_absorb = (None, head) if method.init_head == "absorb" else (head, None)
    if method.condition_on == "guidance" and len(values) > 1 and EMBEDDED in teacher.encode([""]):
        raise ValueError(
            f"method.guidance_scales: got {list(values)}, but {teacher.name} is told its guidance scale; "
            "leave it out, and train for one scale"
        )
    roles = make_roles(
        teacher, config, seed, values, gan_step_counts, kept, method.needs.fake, to_absorb, on_meta,
        method.needs.surrogate, method.times(teacher.schedule) if config.per_step else None,
    )  # fmt: skip
    roles = replace(roles, embedded_guidance=method.guidance.scale)
    if init_from is not None and is_foreign(init_from):
        say(foreign.initialize(roles, init_from))
    elif init_from is not None:
        initialize(roles, init_from)
    return roles


def _require_one_network(teacher: Backbone, head: Head | None) -> None:
    """Check that steps can have weights of their own.

    Raises ValueError for a pair of networks, and for a head.
    """
    if isinstance(teacher.module, Experts):
        raise ValueError(
            f"roles.per_step: got true, but {teacher.name} has two networks already, each for a part of the times; "
            "set it to false"
        )
    if head is not None:
        raise ValueError(
            "roles.per_step: got true for a student that begins with a head, which looks at all steps; "
            "set method.init_head=drop, or roles.per_step=false"
        )


def _head(
    method: Method, teacher: Backbone, seed: int, paths: Trajectories | None, init_from: Path | None
) -> Head | None:
    if init_from is not None and (head := inherited_head(method, teacher, init_from)) is not None:
        return head
    if method.head == "none":
        return None
    grids = [method.times(teacher.schedule, k) for k in method.counts]
    if paths is None:
        return make_head(method.head, teacher.schedule, unknown(teacher.shape, grids), seed)
    return make_head(
        method.head,
        teacher.schedule,
        facts_of(teacher.schedule, paths.whole, paths.grid, paths.states[:, -1], grids),
        seed,
    )


def inherited_head(method: Method, teacher: Backbone, init_from: Path | None) -> Head | None:
    """Return the head that a student inherits from a finished student.

    None where there is no head to inherit. Raises ValueError if method, teacher and finished student do not
    go together.
    """
    if init_from is None or is_foreign(init_from):
        require_initial_student(method, "", False, "the teacher" if init_from is None else str(init_from))
        if init_from is not None:
            require_fitting(teacher, init_from)
        return None
    card = read_card(init_from)
    require_own(card, teacher, init_from)
    require_initial_student(method, card.head, card.analytic_first_step, f"the student in {init_from}")
    if method.init_head == "drop" or not card.head:
        return None
    head = read_head(init_from, teacher.schedule)
    most, cure = max(method.counts), f"that of {init_from} was made for no more: choose as many, or drop the head"
    require_steps(kind_of(head), head.counts, most, "method.steps", cure)
    return head


def require_same_lora(teacher: Backbone, folder: Path, config: RolesConfig, steps: int) -> None:
    """Check that a run for `steps` steps can continue a finished student.

    Raises ValueError where the run trains other weights, the teacher lacks its layers, or the rank is another.
    """
    card = read_card(folder)
    _require_kind(card, folder, config, steps)
    if card.weights != "lora":
        return
    place = step_folders(folder, card)[0]
    state, known = read_lora(place, isinstance(teacher.module, Experts)), plain_layers(teacher.module)
    layers = {k.rsplit(".lora_", 1)[0]: v for k, v in state.items() if ".lora_A" in k}
    if missing := sorted(n for n in layers if n not in known):
        raise ValueError(
            f"init_from: {folder} is a student of {card.base}, and {teacher.name} has no layer {missing[0]} "
            f"({len(missing)} of {len(layers)} are missing); start from a student of this model"
        )
    rank = next((v.shape[0] for n, v in layers.items() if n != teacher.time_layer), config.rank)
    if rank != config.rank:
        raise ValueError(f"init_from: {folder} has a LoRA of rank {rank}, got {config.rank}; set roles.rank={rank}")


def _require_kind(card: StudentCard, folder: Path, config: RolesConfig, steps: int) -> None:
    if (card.weights != "full") != config.lora:
        raise ValueError(
            f"init_from: {folder} is a student of weights {card.weights}; "
            f"set roles.lora={str(card.weights != 'full').lower()}"
        )
    if card.per_step and not config.per_step:
        raise ValueError(
            f"init_from: {folder} is a student with weights of its own for each of its {card.steps[0]} steps; "
            "set roles.per_step=true"
        )
    if card.per_step and card.steps[0] != steps:
        raise ValueError(
            f"init_from: {folder} has weights for {card.steps[0]} steps, this student is to have them for {steps}; "
            f"set method.steps={card.steps[0]}"
        )


def initialize(roles: Roles, folder: Path) -> None:
    """Initialize the student of a run from the student in `folder`.

    Both students are conditioned on the same values. Raises ValueError if the student in `folder` does not
    fit.
    """
    card = read_card(folder)
    _require_kind(card, folder, roles.config, len(roles.step_names))
    if card.weights == "none":
        return  # a head alone, which `roles_for` has set
    parts, layer = read_parts(folder, roles.backbone), roles.backbone.time_layer
    values = card.condition_values if parts.vectors else ()
    carries = layer and not parts.vectors and any(k.startswith(f"{layer}.lora_") for k in parts.lora or {})
    check_conditioning(str(folder), values, roles.condition_values, layer if carries else "")
    states = [p.lora if p.network is None else p.network.state_dict() for p in (parts, *parts.later)]
    state, *later = [state for state in states if state is not None]
    roles.start_from(state, parts.vectors, later)


def check_conditioning(student: str, values: tuple[float, ...], wanted: tuple[float, ...], lora_on: str = "") -> None:
    """Check that a student can continue another student's conditioning.

    Raises ValueError if a student conditioned on `wanted` cannot continue a student conditioned on `values`.
    `lora_on` names the layer of the condition where the initial student has a LoRA on that layer.
    """
    if values and set(values) != set(wanted):
        raise ValueError(
            f"init_from: {student} is conditioned on {_counted(values)}, this student on {_counted(wanted)}; "
            "set method.steps, method.condition or method.guidance_scales to match"
        )
    if wanted and not values and lora_on:
        raise ValueError(
            f"init_from: this student is conditioned on {_counted(wanted)} through {lora_on}, "
            f"but {student} has a LoRA on {lora_on}; "
            f"train that one with {lora_on} in roles.exclude, or use roles.lora=false for both"
        )


def _counted(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values) if values else "nothing"
