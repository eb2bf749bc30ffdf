"""The settings of a run as data.

Settings are kept as JSON in a run's checkpoints and compared at resumption.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones.modules import dtype_of
from ..backbones.process import LEVELS, PROBED, differences, probe, process_data
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..hashes import bytes_of
from ..methods.method import Method
from ..methods.presets import METHODS
from ..reading import read_json
from ..roles.roles import Roles, RolesConfig
from ..roles.sharding import whole
from .state import checkpoints

if TYPE_CHECKING:
    from .loop import TrainConfig

DERIVED = ("begin ", "trajectories ")  # hashes that follow from other settings: named only if nothing else differs
FREE = ("shard", "context", "replicas", "checkpoint_every", "keep", "global_batch")  # these do not change the result


def settings_of(
    roles: Roles,
    method: Method,
    data: Embeddings,
    config: "TrainConfig",
    batches: int,
    real: ImageData | None,
    paths: Trajectories | None,
) -> dict[str, Any]:
    """Return all settings that a resumed run must share.

    The settings are ready for JSON. Prompts and the student's initial weights are included. The length of a
    run may grow if no rate and no stage depends on the length. `batches` is the number of batches per
    iteration over all processes.
    """
    backbone, fixed = roles.backbone, config.decay or method.needs.length
    free = FREE if fixed else (*FREE, "iterations")
    return json.loads(json.dumps({
        "method": {
            "kind": type(method).__name__,
            **(
                asdict(method)
                if is_dataclass(method) and not isinstance(method, type)
                else {"settings": repr(method)}
            ),
        },
        "train": {k: v for k, v in (asdict(config) | {"accumulate": batches}).items() if k not in free},
        "roles": asdict(roles.config),
        "teacher": {
            "weights": data.identity.partition("-")[0], "shape": backbone.shape,
            "dtype": str(dtype_of(backbone.module)).removeprefix("torch."),
            "time_layer": backbone.time_layer, **process_data(backbone, LEVELS),
        },
        "begin": _digest(roles.average),
        "prompts": {"count": data.count, "hash": _hash("\0".join(data.prompts).encode())},
        "conditions": {} if backbone.encoders else probe(data.at(slice(PROBED), torch.device("cpu")), PROBED),
        "images": None if real is None else real.key,
        "trajectories": None if paths is None else paths.key,
    }, default=str))  # fmt: skip


def require_unchanged(before: Mapping[str, Any] | None, now: Mapping[str, Any], run: str) -> None:
    """Check that a checkpoint's settings equal the settings now.

    Raises ValueError that names every difference, with both values.
    """
    if before is None:
        raise ValueError(
            f"run {run}: its checkpoint says nothing of its settings, it is of fewstep 0.1.0; "
            "finish it with that version, or choose another --out"
        )
    odd = differences(_completed(before, now), now)
    if any(d.startswith("prompts.") for d in odd):  # other prompts have other conditions
        odd = [d for d in odd if not d.startswith("conditions.")]
    if own := [d for d in odd if not d.startswith(DERIVED)] or odd:
        raise ValueError(
            f"run {run}: was made with other settings: {', '.join(map(_spoken, own))}; "
            "set them back, or choose another --out"
        )


def _completed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's settings with newer fields at their defaults.

    The fields are those of method and roles. A setting that a newer version has added leaves older runs as they were.
    """
    method, kind, roles = before.get("method"), METHODS.get(str(now["method"].get("kind"))), before.get("roles")
    if isinstance(roles, Mapping):
        before = {**before, "roles": _filled(roles, json.loads(json.dumps(asdict(RolesConfig()))))}
    if kind is None or not isinstance(method, Mapping) or not is_dataclass(kind):
        return before
    return {**before, "method": _filled(method, json.loads(json.dumps(asdict(kind()), default=str)))}


def _filled(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with what is missing from the defaults."""
    blocks = {k: _filled(v, defaults[k]) for k, v in value.items() if isinstance(v, dict) and k in defaults}
    return {**defaults, **value, **blocks}


def _spoken(difference: str) -> str:
    """Return a difference in the user's words.

    A hash of the student's initial weights is `init_from`.
    """
    name, _, values = difference.partition(" ")
    return f"init_from, the student to initialize from (weights {values})" if name == "begin" else difference


def begun(run: Path, now: Mapping[str, Any]) -> int:
    """Return the number of iterations in a run's folder.

    The weights are not read. Raises ValueError if the iterations are another run's.
    """
    if not (found := checkpoints(run)):
        return 0
    try:
        state = read_json(found[-1] / "state.json", "")
    except (OSError, ValueError):
        return 0  # damaged: the reader of the whole checkpoint reports the damage
    settings, step = state.get("settings"), state.get("step")
    if type(step) is not int or not isinstance(settings, dict | None):
        return 0  # damaged
    require_unchanged(settings, now, str(run))
    return step


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in whole({name: tensors[name] for name in sorted(tensors)}):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
