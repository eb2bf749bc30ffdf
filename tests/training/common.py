"""A short training, and what its tests read of it."""

import hashlib
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.backbones.base import Backbone
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Embeddings, embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import Step, TrainConfig, distill

from .. import tiny

METHOD = DistributionMatching(steps=2, warmup=2, guidance=Guidance(scale=2.0))
CONFIG = TrainConfig(iterations=6, batch=4, lr=1e-3, fake_lr=1e-2, checkpoint_every=3)


def parts(share: bool = True, backbone: Backbone | None = None) -> tuple[Roles, Embeddings]:
    backbone = backbone or tiny.denoiser()
    return make_roles(backbone, RolesConfig(lora=share, rank=2)), embed(backbone, tiny.WORDS, None, "tiny")


def run(
    share: bool = True,
    method: DistributionMatching = METHOD,
    config: TrainConfig = CONFIG,
    out: Path | None = None,
    stop: int | None = None,
) -> tuple[Roles, list[Step]]:
    roles, data = parts(share)
    steps = []
    for step in distill(roles, method, data, config, out):
        steps.append(step)
        if step.iteration == stop:
            break
    return roles, steps


def metrics(steps: list[Step]) -> list[tuple[int, dict[str, float]]]:
    return [(s.iteration, dict(s.metrics)) for s in steps]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {f"{p.stem}/{n}": t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def wait_for(checkpoint: Path) -> None:
    """Wait until a checkpoint is written, which happens beside the training."""
    until = time.monotonic() + 60
    while not checkpoint.is_dir() and time.monotonic() < until:
        time.sleep(0.01)


def digest(module: nn.Module) -> str:
    """SHA-256 of the base weights, adapters left out."""
    sha = hashlib.sha256()
    for name, tensor in sorted(
        (n.replace(".base_layer", ""), t) for n, t in module.state_dict().items() if "lora_" not in n
    ):
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
