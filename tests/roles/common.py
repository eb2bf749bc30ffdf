"""States and conditions for the networks of roles, and students away from their teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, Cond
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles import adapters
from fewstep.roles.roles import Role, Roles, RolesConfig, make_roles
from fewstep.student.student import Origin, Student, student_card

from .. import tiny

ORIGIN = Origin("tiny", "", 0, 0.0, "tdm")


def given(backbone: Backbone) -> tuple[Tensor, Tensor, Cond, Cond]:
    x = torch.randn((2, *backbone.shape), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([backbone.schedule.t_max, backbone.schedule.t_max / 3], dtype=torch.float64)
    return (
        x,
        t.round() if backbone.schedule.resolution else t,
        backbone.encode(["red cat", "blue dog"]),
        backbone.encode([""]),
    )


def perturb(roles: Roles, role: Role, seed: int, size: float = 0.1) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in roles.trained[role].values():
            p.add_(size * torch.randn(p.shape, generator=rng))


def attached(backbone: Backbone, state: Mapping[str, Tensor], rank: int = 2) -> Student:
    """A student whose LoRA lies in the backbone's own network, beside those that are there."""
    card = student_card(make_roles(tiny.denoiser(), RolesConfig(rank=rank)), DistributionMatching(), ORIGIN)
    adapter = adapters.attach_adapter(backbone.module, state, rank, rank)
    backbone.module.requires_grad_(False).eval()
    return Student(card, backbone, backbone.module, adapter)
