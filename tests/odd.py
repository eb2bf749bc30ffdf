"""A small network of points, wrapped and trained, for the tests of odd networks and options."""

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewstep
from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import Flow
from fewstep.roles.roles import RolesConfig

N = TypeVar("N", bound=nn.Module)
METHOD = fewstep.TDM(steps=2, guidance=1.0, warmup=1)


class Net(nn.Module):
    """A perceptron of points [B, 2]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time, self.inp, self.mid, self.out = (
            nn.Linear(1, width),
            nn.Linear(2, width),
            nn.Linear(width, width),
            nn.Linear(width, 2),
        )

    def hidden(self, x: Tensor, t: Tensor) -> Tensor:
        return F.silu(self.mid(F.silu(self.inp(x) + self.time(t[:, None].to(x.dtype)))))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.hidden(x, t))


def started(net: N, std: float = 0.3) -> N:
    """The network with weights that say something."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=rng) * std)
    return net


def wrapped(net: nn.Module, **settings: Any) -> Denoiser:
    return Denoiser(net, **{"schedule": Flow(), "shape": (2,), "prediction": "flow", **settings})


def trained(teacher: Denoiser, out: Path | None = None, iterations: int = 4, **roles: Any) -> fewstep.Step:
    """The last step of a short training."""
    *_, step = fewstep.distill(
        teacher,
        METHOD,
        train=fewstep.TrainConfig(iterations=iterations, batch=4, lr=1e-2, fake_lr=1e-3),
        roles=RolesConfig(**({"rank": 2} if roles.get("lora", True) else {}) | roles),
        out=out,
        watch=None,
    )
    return step
