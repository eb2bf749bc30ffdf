"""Supervised fine-tuning of a teacher on real images.

The teacher is fine-tuned before distillation: a better teacher makes a better student (TDM sec. 3.1).
"""

import copy
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.modules import dtype_of
from ..core import timegrid
from ..core.prediction import target
from ..core.schedule import diffuse, expand
from ..data.images import ImageData
from ..roles import adapters
from ..roles.roles import RolesConfig
from .fit import FitConfig, FitStep, fit
from .state import seeded

ADAPTER = "finetune"


def finetune(
    backbone: Backbone,
    data: ImageData,
    how: RolesConfig,
    config: FitConfig,
    run: Path,
    seed: int = 0,
    drop_caption: float = 0.1,
) -> Generator[FitStep, None, None]:
    """Train the backbone's network on the network's own prediction type.

    Times are uniform. Afterwards the network has the averaged weights. `how.lora` trains a LoRA, which is
    merged at the end; otherwise all weights are trained. Captions are dropped at the rate `drop_caption`, so
    guidance still works. Resumes from `run`. Raises ValueError for `how.quantize` and `how.per_step`, and for float16
    weights.
    """
    if how.per_step:
        raise ValueError("roles.per_step: got true, and a teacher has no steps of its own; leave it out")
    if how.quantize is not None:
        raise ValueError(
            f"roles.quantize: got {how.quantize}, a fine-tune changes the weights themselves; leave it out"
        )
    module, schedule = backbone.module, backbone.schedule
    if dtype_of(module) == torch.float16:
        raise ValueError(
            "dtype: got float16, whose range loses the gradients of a training; load the teacher in bfloat16 or float32"
        )
    device = next(module.parameters()).device
    adapters.remove_adapters(module, (ADAPTER, "student", "fake"))
    if how.lora:
        adapters.add_adapter(
            module, ADAPTER, how.rank, how.alpha or how.rank, adapters.targets(module, how.targets, how.exclude), seed
        )
        layers = adapters.adapter_layers(module)
        trained = nn.ParameterList(adapters.adapter_parameters(module, ADAPTER).values()).requires_grad_(True)
    else:
        layers, trained = [], nn.ParameterList(module.parameters()).requires_grad_(True)
    average = copy.deepcopy(trained)
    null = data.embeddings.unconditional(device)

    def loss_at(step: int) -> Tensor:
        rng, n = seeded(seed, step, "finetune"), config.batch
        x0, cond = data.draw(n, rng, device)
        low, high = (torch.full((n,), s, dtype=torch.float64) for s in (schedule.t_clean, schedule.t_max))
        t = timegrid.draw_between(schedule, low, high, rng).to(device)
        eps = torch.randn(x0.shape, generator=rng).to(device)
        dropped = (torch.rand(n, generator=rng) < drop_caption).to(device)
        cond = {
            k: torch.where(dropped.reshape(-1, *[1] * (v.ndim - 1)), null[k].expand_as(v), v) for k, v in cond.items()
        }
        adapters.switch(layers, ADAPTER if layers else None)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            m = backbone.predict(module, diffuse(schedule, x0, t, eps), t, cond)
        alpha, sigma = expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)
        return (m - target(x0, eps, alpha, sigma, backbone.row)).square().mean()

    yield from fit(trained, average, loss_at, config, run / "finetune")
    with torch.no_grad():
        for p, a in zip(trained, average, strict=True):
            p.copy_(a)
    trained.requires_grad_(False)
    adapters.merge(module, ADAPTER)
