"""What a run begins with: the networks of its roles, and a student that begins as a finished one."""

from pathlib import Path

import torch

from .backbones.base import Backbone
from .backbones.files import load_lora, load_network, load_vectors
from .export.card import read_card
from .methods.method import Method, require_beginning
from .roles.roles import Roles, RolesConfig, make_roles
from .roles.step_condition import unfold
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
    vectors = load_vectors(folder) if told else {}
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
            f"start: {start} is a student that is told nothing, with a LoRA on {lora_on}, where this one is told {_counted(counts)}; train it with roles.skip=[add_embedding, {lora_on}], or both with roles.share=false"
        )


def _counted(told: tuple[float, ...]) -> str:
    return f"one of {', '.join(f'{v:g}' for v in told)}" if told else "nothing"
