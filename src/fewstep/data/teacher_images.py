"""The teacher's own samples as clean states.

For methods that need images where no real images exist.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.base import Backbone, guided, rows
from ..backbones.generate import device_of, trajectory
from ..backbones.process import LEVELS, process_data
from ..core import timegrid
from ..core.guidance import Guidance
from .images import ImageData, made_once
from .prompts import Embeddings

TEACHER_IMAGES, TEACHER_STEPS = 1024, 25  # default number of samples, and of steps


def teacher_images(
    backbone: Backbone,
    data: Embeddings,
    count: int,
    steps: int,
    guidance: Guidance,
    cache: Path | None,
    seed: int = 0,
    chunk: int = 32,
    show: Callable[[int], None] = lambda done: None,
) -> ImageData:
    """Return `count` guided samples of the teacher in `steps` steps.

    Prompts are drawn evenly. With a cache folder the samples are generated once. `show` is called with the
    number of finished samples.
    """
    process = process_data(backbone, LEVELS)
    made = [data.key, count, steps, asdict(guidance), seed, process]
    key = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(seed))
    of = order.repeat(-(-count // data.count))[:count]
    own = data.take(of, key)

    def draw() -> Iterator[Tensor]:
        device = device_of(backbone.module)
        null, times = data.unconditional(device), timegrid.uniform(backbone.schedule, steps)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            cond = {k: v.to(device) for k, v in rows(own.cond, part).items()}
            seeds = [seed + i for i in range(part.start, part.stop)]
            teacher = guided(backbone, backbone.module, cond, null, guidance)
            yield trajectory(backbone, teacher, seeds, times)[-1].x.cpu()
            show(part.stop)

    path = None if cache is None else cache / f"teacher-{key}.safetensors"
    return ImageData(made_once(path, count, backbone.shape, draw), own, key)
