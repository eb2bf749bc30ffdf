"""Students of others as a start of one's own.

A file has a LoRA or a whole network. What a file changes in the base is fitted to the student's adapters.
Layers that carry no adapter here, and directions beyond the rank, are left out, and how much that is, is
said.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.denoiser_file import read_denoiser
from ..backbones.experts import PARTS, Experts, experts_of, parted
from ..backbones.lora import DENOISERS, LoraError, denoiser_for, low_rank, read_lora, second_of_pair, targets_of
from ..backbones.low_rank import Part, of_matrix, of_product
from ..backbones.modules import dtype_of
from ..backbones.parts import DiffusersBackbone
from ..backbones.weights import UnfitError, header
from ..roles import adapters
from ..roles.roles import Roles
from ..student.folder import require_folder

SUFFIX = ".safetensors"
SHOWN = 3  # layers that are named
# Ends of names of what a LoRA's file changes in whole weights, biases and modulations, next to its LoRA.
WHOLE = (".diff", ".diff_b", ".diff_m")
CURE = "pass a LoRA or the weights of this very kind of model, or leave it out"


class Change(NamedTuple):
    """What a file adds to one layer of the network.

    A product with `up` [out, r] and `down` [r, in], or a whole tensor.
    """

    layer: str
    up: Tensor | None
    down: Tensor | None
    whole: Tensor | None


def is_foreign(place: Path) -> bool:
    """Return whether `init_from` is a file of weights."""
    return place.suffix == SUFFIX and not place.is_dir()


def require_initial(source: str | Path) -> Path:
    """Return the folder of a student, or a file of weights.

    Raises ValueError if there is neither.
    """
    if not isinstance(source, str | Path) or not is_foreign(place := Path(source).expanduser()):
        return require_folder(source, "init_from")
    if not place.is_file():
        raise ValueError(f"init_from: there is no {source}; pass a run, its final/ folder or a {SUFFIX} file")
    return place


def require_fitting(teacher: Backbone, file: Path) -> None:
    """Check that a file's layers are those of a teacher.

    Of a whole network, the header alone is read. Raises ValueError.
    """
    if not isinstance(teacher, DiffusersBackbone):
        raise ValueError(
            f"init_from: got {file}, and the teacher {teacher.name} is a network of one's own; "
            "pass a run or its final/ folder"
        )
    for part in _files(teacher, file):
        with _named(part):
            if is_lora(part):
                for _ in _of_lora(teacher, part):
                    pass


def initialize(roles: Roles, file: Path) -> str:
    """Initialize the student of a run from a file of other people.

    Returns a line that says what of the file the student has. Raises ValueError where the file does not fit, and where
    nothing of it is kept.
    """
    backbone, network = roles.backbone, roles.networks["student"]
    assert isinstance(backbone, DiffusersBackbone)
    if roles.config.quantize is not None:
        with _named(file):
            if not is_lora(file):
                raise UnfitError("it is a whole network, to be compared with a base in full", "set roles.quantize=null")
    changes = (change for part in _files(backbone, file) for change in _changes(backbone, part))
    if not roles.config.lora:
        with _named(file):
            count = _added(network, changes)
        roles.start_from(network.state_dict())
        return f"init_from: the student starts with what {file.name} changes in {count} layers"
    rank, state = roles.config.rank, adapters.adapter_state(network, "student")
    own = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    kept = whole = lost = 0.0
    left, used = list[str](), 0
    with _named(file), torch.no_grad():
        for change in changes:
            part = _part(change, rank)
            whole += part.whole
            if change.layer not in own:
                left, lost = [*left, change.layer] if part.whole else left, lost + part.whole
                continue
            kept, used = kept + part.kept, used + 1
            _put(state, change.layer, part)
        if not kept > 0:
            raise UnfitError(
                "it changes none of the layers that carry the student's LoRA",
                "set roles.targets=all and roles.exclude=[]",
            )
    roles.start_from(state)
    return (
        f"init_from: rank {rank} keeps {kept / whole:.1%} of the energy of what {file.name} changes, in {used} layers"
        + _said_left(left, lost / whole)
        + _said_alone(backbone, file)
    )


def _said_left(layers: list[str], share: float) -> str:
    if not layers:
        return ""
    named = ", ".join(layers[:SHOWN]) + (f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else "")
    return f"; {share:.1%} of it is in layers without LoRA here ({named})"


def _said_alone(backbone: DiffusersBackbone, file: Path) -> str:
    """Say which network of a pair the files say nothing of."""
    second = second_of_pair(file.name)
    if not isinstance(backbone.module, Experts) or second is None or len(_files(backbone, file)) > 1:
        return ""
    return f"; the network for {'high' if second else 'low'} noise starts from the teacher"


def _put(state: dict[str, Tensor], layer: str, part: Part) -> None:
    """Write a low-rank part into an adapter's tensors.

    Rows of A beyond the part's rank stay as they were drawn, and the columns of B beyond it are zero: the adapter
    changes what the part changes, and its other directions can be trained.
    """
    a, b, rank = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"], part.down.shape[0]
    down, up = a.clone().reshape(len(a), -1), torch.zeros_like(b).reshape(len(b), -1)
    down[:rank], up[:, :rank] = part.down.to(down), part.up.to(up)
    state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = down.view_as(a), up.view_as(b)


def _part(change: Change, rank: int) -> Part:
    if change.up is not None and change.down is not None:
        return of_product(change.up, change.down, rank)
    assert change.whole is not None
    return of_matrix(change.whole.reshape(len(change.whole), -1), rank)


def _added(network: nn.Module, changes: Iterator[Change]) -> int:
    """Add changes to a network's own weights. Returns how many layers changed."""
    count, own = 0, network.state_dict()
    with torch.no_grad():
        for count, change in enumerate(changes, 1):  # noqa: B007 - the last one counts
            name = f"{change.layer}.weight" if f"{change.layer}.weight" in own else change.layer
            if name not in own:
                raise UnfitError(f"it holds whole differences of weights, {name!r}", "train a LoRA (roles.lora=true)")
            weight = own[name]
            moved = change.whole if change.up is None or change.down is None else change.up @ change.down
            assert moved is not None
            weight += moved.reshape(weight.shape).to(weight)
    return count


def _changes(backbone: DiffusersBackbone, file: Path) -> Iterator[Change]:
    return _of_lora(backbone, file) if is_lora(file) else _of_network(backbone, file)


def is_lora(file: Path) -> bool:
    """Return whether a file holds a LoRA, by its tensors' names.

    Raises UnfitError for a damaged file.
    """
    return any(re.search(r"lora|hada_|lokr_|\.alpha$", name) for name in header(file))


def _of_lora(backbone: DiffusersBackbone, file: Path) -> Iterator[Change]:
    """Yield what a LoRA changes in the network.

    Raises LoraError for what is none, or none of this network.
    """
    pipe = parted(backbone.pipe)
    pair, facts = isinstance(backbone.module, Experts), read_lora(str(file))
    both = any(n.startswith(f"{PARTS[1]}.") for n in facts.tensors)  # names say for which network they are
    own = PARTS[0] if pair and both else denoiser_for(pipe, file.name)
    whole = {n: t for n, t in facts.tensors.items() if n.endswith(WHOLE)}
    facts = facts._replace(tensors={n: t for n, t in facts.tensors.items() if n not in whole})
    for layer, factors, target in targets_of(pipe, facts, own):
        if target.part not in DENOISERS:
            raise LoraError(
                f"it changes the {target.part} too ({layer}), which a student does not",
                "pass a LoRA of the network alone",
            )
        scale, up, down = low_rank(layer, factors, target, facts)
        device, name = target.layer.weight.device, f"{target.part}.{target.name}" if pair else target.name
        yield Change(name, scale * up.to(device), down.to(device), None)
    for name, tensor in whole.items():  # of norms, biases and modulations, which carry no LoRA
        yield Change(name, None, None, tensor.float())


def _of_network(backbone: DiffusersBackbone, file: Path) -> Iterator[Change]:
    """Yield what a whole network has otherwise than the base.

    Raises UnfitError where it is another network.
    """
    pair, network = isinstance(backbone.module, Experts), backbone.module
    index = PARTS.index(denoiser_for(parted(backbone.pipe), file.name)) if pair else 0
    own = experts_of(network)[index]
    state = _plain(own)
    kind: Any = type(own)
    config: Any = own.config
    other = read_denoiser(kind, [file], config, dtype_of(own)).state_dict()
    for name, weight in state.items():
        change = other.pop(name).to(weight.device).float() - weight.float()
        layer = name.removesuffix(".weight") if weight.ndim > 1 else name
        if bool(change.any()):
            yield Change(f"{PARTS[index]}.{layer}" if pair else layer, None, None, change)


def _plain(network: nn.Module) -> Mapping[str, Tensor]:
    """Return a network's own tensors under their plain names."""
    return {n.replace(".base_layer", ""): t for n, t in network.state_dict().items() if "lora_" not in n}


def _files(backbone: DiffusersBackbone, file: Path) -> list[Path]:
    """Return the files of a student.

    Of a pair, the other network's is next to it under the same name.
    """
    second = second_of_pair(file.name)
    if not isinstance(backbone.module, Experts) or second is None:
        return [file]
    word, other = ("low", "high") if second else ("high", "low")
    beside = file.with_name(re.sub(rf"(?i)(?<![a-z]){word}(?![a-z])", other, file.name))
    return [file, *([beside] if beside.is_file() else [])]


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Raise what is wrong with a file, as an error of `init_from`."""
    try:
        yield
    except (LoraError, UnfitError) as error:
        raise ValueError(f"init_from: {file} cannot be used ({error}); {error.cure or CURE}") from error
