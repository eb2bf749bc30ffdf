"""What a run is, as data: kept in its checkpoints as JSON, compared when it is resumed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones.modules import dtype_of
from ..backbones.process import LEVELS, differences, probe, process_data
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..methods.method import Method
from ..reading import read_json
from ..roles.roles import Roles
from ..roles.sharding import whole
from .state import checkpoints

if TYPE_CHECKING:
    from .loop import TrainConfig

DERIVED = ("begin ", "trajectories ")  # hashes of what other settings decide: named where nothing else differs
FREE = ("shard", "checkpoint_every")  # what changes nothing of what comes out


def settings_of(
    roles: Roles, method: Method, data: Embeddings, config: "TrainConfig", batches: int, real: ImageData | None, paths: Trajectories | None
) -> dict[str, Any]:
    """Every setting that a resumed run must share, prompts and the student's beginning included, ready for JSON.

    The length of a run may grow where no rate and no stage depends on it. `batches` are those of an iteration, in whichever processes they are.
    """
    backbone, fixed = roles.backbone, config.decay or method.needs.length
    free = FREE if fixed else (*FREE, "iterations")
    return json.loads(json.dumps({
        "method": {"kind": type(method).__name__, **(asdict(method) if is_dataclass(method) and not isinstance(method, type) else {"settings": repr(method)})},
        "train": {k: v for k, v in (asdict(config) | {"accumulate": batches}).items() if k not in free},
        "roles": asdict(roles.config),
        "teacher": {
            "weights": data.identity.partition("-")[0], "shape": backbone.shape, "dtype": str(dtype_of(backbone.module)).removeprefix("torch."),
            "time_layer": backbone.time_layer, **process_data(backbone, LEVELS),
        },
        "begin": _digest(roles.average),
        "prompts": {"count": data.count, "hash": _hash("\0".join(data.prompts).encode())},
        "conditions": {} if backbone.encoders else probe(data.cond),
        "pictures": None if real is None else real.key,
        "trajectories": None if paths is None else paths.key,
    }, default=str))  # fmt: skip


def require_unchanged(before: Mapping[str, Any] | None, now: Mapping[str, Any], run: str) -> None:
    """Raises ValueError that names every setting in which a checkpoint's run is another, with both values."""
    if before is None:
        raise ValueError(
            f"run {run}: its checkpoint says nothing of its settings, it is of fewstep 0.1.0; finish it with that version, or choose another --out"
        )
    odd = differences(before, now)
    if any(d.startswith("prompts.") for d in odd):  # conditions are those of the prompts
        odd = [d for d in odd if not d.startswith("conditions.")]
    if own := [d for d in odd if not d.startswith(DERIVED)] or odd:
        raise ValueError(f"run {run}: was made with other settings: {', '.join(map(_spoken, own))}; set them back, or choose another --out")


def _spoken(difference: str) -> str:
    """A hash of the weights that the student begins with is `start`."""
    name, _, values = difference.partition(" ")
    return f"start, the student to begin as (weights {values})" if name == "begin" else difference


def begun(run: Path, now: Mapping[str, Any]) -> int:
    """Iterations that a run's folder holds by now, without reading its weights. Raises ValueError where they are another run's."""
    if not (found := checkpoints(run)):
        return 0
    try:
        state = read_json(found[-1] / "state.json", "")
    except (OSError, ValueError):
        return 0  # damaged: whoever reads the whole of it says so
    settings, step = state.get("settings"), state.get("step")
    if type(step) is not int or not isinstance(settings, dict | None):
        return 0  # as damaged
    require_unchanged(settings, now, str(run))
    return step


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = whole({name: tensors[name]})[name]
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
