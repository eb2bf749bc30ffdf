"""The teacher's own pictures as clean states, for methods that start from pictures where there are no real ones."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..backbones.base import Backbone, guided, rows
from ..backbones.generate import trajectory
from ..core import timegrid
from .pictures import RealData
from .prompts import Embeddings


def teacher_pictures(
    backbone: Backbone, data: Embeddings, count: int, steps: int, guidance: float, cache: Path | None, seed: int = 0, chunk: int = 32
) -> RealData:
    """`count` guided samples of the teacher in `steps` steps, of prompts drawn evenly; drawn once where there is a cache folder."""
    key = hashlib.sha256(json.dumps([data.key, count, steps, guidance, seed]).encode()).hexdigest()[:24]
    path = None if cache is None else cache / f"teacher-{key}.safetensors"
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(seed))
    of = order.repeat(-(-count // data.count))[:count]
    own = Embeddings(rows(data.cond, of), data.null, count, 0, key)
    if path is not None and path.exists():
        try:
            return RealData(load_file(path)["x0"], own, key)
        except (SafetensorError, KeyError):
            path.unlink()
    device = next(backbone.module.parameters()).device
    null, times, parts = data.unconditional(device), timegrid.uniform(backbone.schedule, steps), []
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        cond = {k: v.to(device) for k, v in rows(own.cond, part).items()}
        seeds = [seed + i for i in range(part.start, part.stop)]
        parts.append(trajectory(backbone, guided(backbone, backbone.module, cond, null, guidance), seeds, times)[-1].x.cpu())
    x0 = torch.cat(parts).contiguous()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"x0": x0}, temporary)
        temporary.replace(path)
    return RealData(x0, own, key)
