"""Checkpoints in safetensors and JSON, written atomically.

A checkpoint is a folder `checkpoint-000100/` with one `.safetensors` file per named group of tensors and one
`state.json`, which holds the hashes of all content. A sharded run of several processes writes parts instead, see
`parts.py`. Files are written under a temporary name and then
renamed. Randomness needs no state: every draw is seeded from (run seed, step, rank, stream), see `seeded`.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import cause_of, cure_of, open_to_others, shapes_of, stream_tensors, sync, sync_all, write_json
from ..hashes import tensors_hash, values_hash
from ..processes import is_first, meet
from ..reading import object_in, reason, require_regular
from ..roles.sharding import shard_like, whole
from .parts import read_parts, require_intact, save_parts

PREFIX = "checkpoint-"
OWN = re.compile(rf"{PREFIX}(\d{{6,}})", re.ASCII)  # our names; copies under other names belong to their owner
PARTS = "parts"  # in state.json: the SHA-256 of each file of a checkpoint in parts
SHA256, STATE_SHA256 = "sha256", "state_sha256"  # of each group's tensors, and of the rest of state.json


def seeded(seed: int, step: int, stream: str, rank: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator that depends only on the arguments.

    A resumed run therefore draws the same numbers as the uninterrupted run.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return an optimizer's per-parameter state as `name.key` tensors.

    Numbers are included. `names` are in the order of the optimizer's parameters. The tensors are the
    optimizer's own, not copies: for full copies of a network they are twice the size of the weights.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(names)
    return {
        f"{name}.{key}": torch.as_tensor(value).detach()
        for name, p in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors` into an optimizer.

    Each tensor, or the tensor's part, moves to the parameter's device; step counts go where the optimizer
    wants them.
    """
    parameters = [(p, bool(group.get("fused"))) for group in optimizer.param_groups for p in group["params"]]
    for name, (p, fused) in zip(names, parameters, strict=True):
        keys = [k for k in tensors if k.rpartition(".")[0] == name]
        for k in keys:
            key = k.rpartition(".")[2]
            own = tensors[k].clone() if key == "step" and not fused else tensors[k].clone().to(p.device)
            if isinstance(optimizer.state[p].get(key), int):
                optimizer.state[p][key] = int(own)
            else:
                optimizer.state[p][key] = own if key == "step" else _ordered_as(p, shard_like(own, p))


def _ordered_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in another one's order in memory.

    Fused AdamW takes this order for granted. A tensor of another shape is returned unchanged.
    """
    if tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def require_optimizer_tensors(wanted: Collection[str], tensors: Mapping[str, Tensor], place: str) -> None:
    """Check that a checkpoint has the optimizer state that is needed.

    `wanted` are the keys `name.key`. Raises ValueError otherwise.
    """
    if odd := next((key for key in tensors if key not in wanted), None):
        raise ValueError(
            f"{place} has optimiser state of {odd.rpartition('.')[0]}, which is not trained here; "
            "delete that folder to go on from an older one"
        )
    if lacking := next((key for key in wanted if key not in tensors), None):
        raise ValueError(
            f"{place} lacks optimiser state of {lacking.rpartition('.')[0]}; "
            "delete that folder to go on from an older one"
        )


def save_checkpoint(
    run: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    in_parts: bool = False,
) -> Path:
    """Write `run/checkpoint-STEP` atomically, and delete old checkpoints.

    Tensors are gathered and written one by one. With `in_parts` all processes have to call, and each writes its part
    of sharded tensors. The newest `keep` checkpoints stay. The checkpoint is on the disk before the folder has the
    final name. Raises OSError (disk full, no permission) with the half-written folder removed; older checkpoints are
    untouched.
    """
    final, temporary = run / f"{PREFIX}{step:06d}", run / f".{PREFIX}{step:06d}.tmp"
    writes = is_first() or not in_parts
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        hashes: dict[str, str] = {}
        if in_parts:
            meet()  # the folder is there
            state = {**state, PARTS: save_parts(temporary, groups)}
        if not writes:
            return final
        for name, tensors in ({} if in_parts else groups).items():
            with (temporary / f"{name}.safetensors").open("xb") as file:
                hashes[name] = stream_tensors(file, shapes_of(tensors), whole(tensors))
        written = {"step": step, "groups": sorted(groups), **state, SHA256: hashes}
        write_json(temporary / "state.json", {**written, STATE_SHA256: values_hash(written)})
        open_to_others(temporary)
        sync_all(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(run)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {final}: {cause_of(error)}; {_cure(cause_of(error))}") from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _cure(error: Exception) -> str:
    return cure_of(error).replace("free some space,", "free some space or choose another --out,")


def checkpoints(run: Path) -> list[Path]:
    """Return all checkpoint folders of a run, oldest first.

    A folder under any other name, such as a copy, is not a checkpoint.
    """
    numbered = [(int(match[1]), p) for p in run.glob(f"{PREFIX}*") if (match := OWN.fullmatch(p.name))]
    return [p for n, p in sorted(numbered) if p.name == f"{PREFIX}{n:06d}" and p.is_dir() and not p.is_symlink()]


def load_checkpoint(folder: Path, whole: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return (groups, state) of one checkpoint.

    Of a checkpoint in parts there are no groups unless `whole`, and the parts are not checked.

    Raises ValueError that names the missing or damaged file; hashes are checked.
    """
    try:
        state = object_in(folder / "state.json")
        written = {k: v for k, v in state.items() if k != STATE_SHA256}
        if (SHA256 in state or STATE_SHA256 in state) and state.get(STATE_SHA256) != values_hash(written):
            raise ValueError("state.json does not have the SHA-256 that it says")
        if isinstance(state["step"], bool) or not isinstance(state["step"], int):
            raise ValueError(f"state.json says step {state['step']!r}")
        if (named := OWN.fullmatch(folder.name)) and int(named[1]) != state["step"]:
            raise ValueError(f"it is of iteration {state['step']}: a copy under another name")
        if PARTS in state:
            if not whole:
                return {}, state
            require_intact(folder, state[PARTS], state[PARTS])
            return read_parts(folder), state
        groups = {name: load_file(require_regular(folder / f"{name}.safetensors")) for name in state["groups"]}
        for name, digest in state.get(SHA256, {}).items():
            if tensors_hash(groups[name]) != digest:
                raise ValueError(f"{name}.safetensors does not have the SHA-256 that state.json says")
    except Exception as error:  # damage raises many types of errors
        raise ValueError(f"checkpoint {folder} is damaged or incomplete ({reason(error)})") from error
    return groups, state


def latest_checkpoint(run: Path, whole: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Return the newest checkpoint as `load_checkpoint`, or None.

    A damaged checkpoint raises ValueError and is never skipped silently.
    """
    found = checkpoints(run)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1], whole)
    except ValueError as error:
        older = (
            f"; delete that folder to go on from {found[-2].name}"
            if len(found) > 1
            else "; choose another --out to start again"
        )
        raise ValueError(f"{error}{older}") from error
