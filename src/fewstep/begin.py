"""What a run begins with: the networks of its roles, and a student that begins as a finished one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .backbones.base import Backbone, Denoiser
from .backbones.files import load_lora, load_network, load_vectors
from .backbones.load import fingerprint
from .backbones.parts import Piped
from .backbones.process import differences, probe, process_data
from .core import timegrid
from .export.card import StudentCard, read_card
from .methods.method import Method, require_beginning
from .roles.roles import Roles, RolesConfig, make_roles
from .roles.step_condition import unfold, width
from .roles.student import without_fold
from .training.paths import Paths
from .trajp.files import load_head
from .trajp.head import Head, facts_of, kind_of, make_head, require_steps, unknown


def roles_for(
    teacher: Backbone, method: Method, config: RolesConfig, seed: int = 0, paths: Paths | None = None, start: Path | None = None
) -> Roles:
    """The networks that a method needs, its student begun as the finished one in `start`. `paths` tell a new head what data look like.

    Without them it knows nothing of them: for looking at a plan.
    """
    if next(teacher.module.parameters()).dtype == torch.float16:
        raise ValueError("dtype: got float16, whose range loses the gradients of a training; load the teacher in bfloat16 or float32")
    head = _head(method, teacher, seed, paths, start)
    against = method.counts if method.needs.adversary else ()
    told = method.conditioned if config.rank or not config.share else ()  # a head alone sees the times themselves
    kept, folding = (None, head) if method.head == "fold" else (head, None)
    roles = make_roles(teacher, config, seed, told, against, kept, method.needs.fake, folding)
    if start is not None:
        start_from(roles, start)
    return roles


def _head(method: Method, teacher: Backbone, seed: int, paths: Paths | None, start: Path | None) -> Head | None:
    if start is not None and (head := begun_head(method, teacher, start)) is not None:
        return head
    if method.head in ("none", "keep", "fold"):
        return None
    grids = [method.times(teacher.schedule, k) for k in method.counts]
    if paths is None:
        return make_head(method.head, teacher.schedule, unknown(teacher.shape, grids), seed)
    return make_head(method.head, teacher.schedule, facts_of(teacher.schedule, paths.whole, paths.grid, paths.states[:, -1], grids), seed)


def begun_head(method: Method, teacher: Backbone, start: Path | None) -> Head | None:
    """The head that a student of this method takes over from the finished one in `start`. Raises ValueError where they do not go together."""
    if start is None:
        require_beginning(method, "", False, "the teacher")
        return None
    card = read_card(start)
    require_own(card, teacher, start)
    require_beginning(method, card.head, card.free_first, f"the student in {start}")
    if method.head == "none" or not card.head:
        return None
    head = load_head(start, teacher.schedule)
    most, cure = max(method.counts), f"that of {start} was made for no more: choose as many, or method.head=none"
    require_steps(kind_of(head), head.counts, most, "method.steps", cure)
    return head


def start_from(roles: Roles, folder: Path) -> None:
    """Let the student of a run begin as the finished one in `folder`, told its step counts where both are.

    Raises ValueError where it does not fit.
    """
    card = read_card(folder)
    if (card.weights != "full") != roles.config.share:
        raise ValueError(f"start: {folder} is a student of weights {card.weights}; set roles.share={str(card.weights != 'full').lower()}")
    if card.weights == "none":
        return  # a head alone, which `roles_for` has put in place
    told = card.told if card.time_layer else ()
    vectors = load_vectors(folder, told, width(roles.backbone.module, card.time_layer)) if told else {}
    if not roles.config.share:
        require_told(str(folder), told, roles.counts)
    else:
        state, layer = load_lora(folder), roles.backbone.time_layer
        plain = without_fold(state, layer) if told else state
        require_told(str(folder), told, roles.counts, layer if len(without_fold(plain, layer)) < len(plain) else "")
        roles.start_from(plain, vectors)
        return
    network = load_network(folder, roles.backbone.module)
    if told:
        unfold(network, card.time_layer, vectors[card.told[0]])
    roles.start_from(network.state_dict(), vectors)


def require_told(start: str, told: tuple[float, ...], counts: tuple[float, ...], lora_on: str = "") -> None:
    """Raises ValueError where a student that is told its step counts, or guidance scales, cannot begin as the one in `start`, which is told others, or which has a LoRA on the layer where it is told."""
    if told and set(told) != set(counts):
        raise ValueError(
            f"start: {start} is a student that is told {_counted(told)}, this one {_counted(counts)}; set method.steps, method.condition or method.scales to match"
        )
    if counts and not told and lora_on:
        raise ValueError(
            f"start: {start} is a student that is told nothing, with a LoRA on {lora_on}, where this one is told {_counted(counts)}; train that one with {lora_on} among its roles.skip, or both with roles.share=false"
        )


def _counted(told: tuple[float, ...]) -> str:
    return f"one of {', '.join(f'{v:g}' for v in told)}" if told else "nothing"


def process_of(backbone: Backbone) -> dict[str, Any]:
    """What a card says of a network of one's own, so that it is not read in another way; empty for a pipeline, whose folder says it."""
    if isinstance(backbone, Piped):
        return {}
    with torch.no_grad():
        heard = probe(backbone.encode([""]))
    return {**process_data(backbone), "shape": tuple(backbone.shape), "conditions": heard}


def require_own(card: StudentCard, backbone: Backbone, folder: Path, other_weights: bool = True) -> None:
    """Raises ValueError where a student meets a base that predicts something else; one of a network of one's own also for another process, other conditions or weights."""
    if not card.own_network:
        if isinstance(backbone, Denoiser):
            raise ValueError(
                f"base: {folder} is a student of {card.base}, a diffusers pipeline, got the Denoiser {backbone.name}; leave base out"
            )
        own = str(backbone.scheduler_config.get("prediction_type", ""))
        if own != card.prediction:
            raise ValueError(
                f"student: {folder} was made on a base that predicts {card.prediction or 'a flow'}, this one predicts {own or 'a flow'}; load it on {card.base}, or on another base of its kind"
            )
        _require_times(card, backbone, folder)
        return
    if isinstance(backbone, Piped):
        raise ValueError(
            f"base: {folder} is a student of {card.base}, a network of one's own, got the pipeline {backbone.name}; pass its fewstep.Denoiser"
        )
    said = asdict(card)
    now = process_of(backbone) | ({"time_layer": backbone.time_layer} if card.time_layer else {})
    if odd := differences({k: said[k] for k in now}, now):
        raise ValueError(f"base: {folder} was made with another base: {', '.join(odd)}; pass the fewstep.Denoiser that it was made from")
    if not other_weights and card.weights != "full" and (here := fingerprint(backbone.module)) != card.base_hash:
        raise ValueError(
            f"base: {folder} was trained on other weights (hash {card.base_hash}, here {here}); load those, or pass other_weights=True to use it on these all the same"
        )


def _require_times(card: StudentCard, backbone: Backbone, folder: Path) -> None:
    """Raises ValueError for times that are not those of the base's process, and for vectors where the base tells nothing."""
    low, high = backbone.schedule.t_clean, backbone.schedule.t_max
    if odd := [t for times in card.timesteps.values() for t in times if not low <= t <= high]:
        raise ValueError(f"student: {folder} visits the time {odd[0]:g}, those of its base are {low:g} to {high:g}; export the run again")
    if card.time_layer not in ("", backbone.time_layer):
        raise ValueError(
            f"student: {folder} is told its steps at {card.time_layer!r}, its base is told at {backbone.time_layer!r}; export the run again"
        )


def require_network(backbone: Backbone, prompts: list[str]) -> None:
    """Raises ValueError where a network of one's own does not take what its Denoiser says of it: one call, before anything is walked or trained."""
    if isinstance(backbone, Piped):
        return
    asked = [*prompts[:1], ""]
    with torch.no_grad():
        cond = backbone.encode(asked)
        if not isinstance(cond, Mapping) or not all(isinstance(v, torch.Tensor) and len(v) == len(asked) for v in cond.values()):
            raise ValueError(f"conditions: what they give for {len(asked)} prompts is no dictionary of tensors [{len(asked)}, ...]")
        device = next(backbone.module.parameters()).device
        x = torch.randn((len(asked), *backbone.shape), generator=torch.Generator().manual_seed(0)).to(device)
        u = torch.full((len(asked),), 0.5, dtype=torch.float64)
        t = timegrid.time_at(backbone.schedule, u).to(device)
        try:
            m = backbone.predict(backbone.module, x, t, {k: v.to(device) for k, v in cond.items()})
        except Exception as error:  # a network of one's own may raise anything
            heard = "".join(f", {k} {list(v.shape)}" for k, v in cond.items())
            raise ValueError(
                f"teacher: the network of {backbone.name} does not take states {list(x.shape)} with times [{len(asked)}]{heard} "
                f"({' '.join(str(error).split())[:160] or type(error).__name__}); check shape and conditions of the Denoiser"
            ) from error
    if not isinstance(m, torch.Tensor) or m.shape != x.shape:
        got = list(m.shape) if isinstance(m, torch.Tensor) else type(m).__name__
        raise ValueError(f"teacher: the network of {backbone.name} gives {got} for states {list(x.shape)}; check the Denoiser's shape")
    if not bool(m.isfinite().all()):
        raise ValueError(
            f"teacher: the network of {backbone.name} gives numbers that are not finite in the middle of its way; check its weights and its schedule"
        )
