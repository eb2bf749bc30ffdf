"""What the tests of one iteration share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, Cond
from fewstep.data.prompts import embed
from fewstep.data.trajectories import (
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    guided_teacher,
    run_to_completion,
    union,
)
from fewstep.methods.distribution_matching import DistributionMatching, matching_losses
from fewstep.methods.method import Loss, RealBatch, TrainBatch
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.roles.roles import TRAINED, Role, Roles, RolesConfig, make_roles

from .. import tiny

BATCH = 8


def conditions(backbone: Backbone, batch: int = BATCH) -> tuple[Cond, Cond]:
    return backbone.encode(
        [["red cat", "blue dog", "a photo of a green house"][i % 3] for i in range(batch)]
    ), backbone.encode([""])


def walked(method: TrajectoryImitation, backbone: Backbone | None = None) -> Trajectories:
    backbone = backbone or tiny.denoiser()
    config, data = TrajectoryConfig(count=6, steps=12), embed(backbone, tiny.WORDS, None, "")
    times = union(backbone.schedule, [method.times(backbone.schedule, k) for k in method.counts])
    source = guided_teacher(backbone, backbone.encode([""]), config, times, method.guidance)
    return run_to_completion(generate_trajectories(backbone, data, config, times, source, None, ""))


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


def train_batch(
    method: DistributionMatching,
    roles: Roles,
    batch: int = BATCH,
    rng: torch.Generator | None = None,
    warming_up: bool = False,
    images: RealBatch | None = None,
    steps: int | None = None,
) -> TrainBatch:
    cond, null = conditions(roles.backbone, batch)
    iteration = method.warmup - 1 if warming_up else method.warmup
    return TrainBatch(iteration, method.warmup + 9, batch, cond, null, images, rng or seed(), None, steps)


def updates(roles: Roles, method: DistributionMatching, warming_up: bool = False, batch: int = BATCH) -> Iterator[Loss]:
    return matching_losses(method, roles, train_batch(method, roles, batch, warming_up=warming_up))
