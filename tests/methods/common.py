"""What the tests of one iteration share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, Cond
from fewstep.methods.distribution_matching import (
    DistributionMatching,
    losses,
)
from fewstep.methods.method import Loss
from fewstep.roles.roles import TRAINED, Role, Roles, RolesConfig, make_roles

from .. import tiny

BATCH = 8


def conditions(backbone: Backbone, batch: int = BATCH) -> tuple[Cond, Cond]:
    return backbone.encode([["red cat", "blue dog", "a photo of a green house"][i % 3] for i in range(batch)]), backbone.encode([""])


def trained(share: bool = True, backbone: Backbone | None = None, size: float = 0.1) -> Roles:
    """Roles in general position: student and fake score have left the teacher."""
    roles = make_roles(backbone or tiny.denoiser(), RolesConfig(lora=share, rank=2))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in TRAINED:
            for p in roles.trained[role].values():
                p.add_(size * torch.randn(p.shape, generator=rng))
    return roles


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def gradients(value: Tensor, roles: Roles, role: Role) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(roles.trained[role].values()), allow_unused=True, retain_graph=True))


def updates(roles: Roles, method: DistributionMatching, warming_up: bool = False, batch: int = BATCH) -> Iterator[Loss]:
    cond, null = conditions(roles.backbone, batch)
    return losses(method, roles, cond, null, batch, seed(), warming_up)
