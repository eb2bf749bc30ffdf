"""Checkpoints: safetensors and JSON only, written under a temporary name and then renamed.

A checkpoint is a folder `checkpoint-000100/` with one `.safetensors` file per named group of tensors and one
`state.json`. Randomness needs no state: every draw is seeded from (run seed, step, rank, stream), see `seeded`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import write_json
from ..roles.sharding import part_of

PREFIX = "checkpoint-"


def seeded(seed: int, step: int, stream: str, rank: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run draws what the straight run drew."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Flatten an optimiser's per-parameter state, numbers too, to `name.key` tensors. `names` in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(names)
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().clone()
        for name, p in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; moves each tensor, or its part, to its parameter's device, steps where the optimiser wants them."""
    parameters = [(p, bool(group.get("fused"))) for group in optimizer.param_groups for p in group["params"]]
    for name, (p, fused) in zip(names, parameters, strict=True):
        keys = [k for k in tensors if k.rpartition(".")[0] == name]
        for k in keys:
            key = k.rpartition(".")[2]
            own = tensors[k].clone() if key == "step" and not fused else tensors[k].clone().to(p.device)
            if isinstance(optimizer.state[p].get(key), int):
                optimizer.state[p][key] = int(own)
            else:
                optimizer.state[p][key] = own if key == "step" else part_of(own, p)


def save_checkpoint(run: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `run/checkpoint-STEP` atomically and delete all but the newest `keep`.

    Raises OSError (disk full, no permission) with the half-written folder removed; older checkpoints are untouched.
    """
    final, temporary = run / f"{PREFIX}{step:06d}", run / f".{PREFIX}{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in groups.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"step": step, "groups": sorted(groups), **state})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {final}: {error}; free some space or choose another --out, then run the same command again"
        ) from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    return sorted(p for p in run.glob(f"{PREFIX}[0-9]*") if p.is_dir())


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(groups, state) of one checkpoint. Raises ValueError naming the file that is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        groups = {name: load_file(folder / f"{name}.safetensors") for name in state["groups"]}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged or incomplete ({error})") from error
    return groups, state


def latest_checkpoint(run: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest readable checkpoint, or None where there is none. A damaged one is an error, never skipped in silence."""
    found = checkpoints(run)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1])
    except ValueError as error:
        older = f"; delete that folder to go on from {found[-2].name}" if len(found) > 1 else "; choose another --out to start again"
        raise ValueError(f"{error}{older}") from error
