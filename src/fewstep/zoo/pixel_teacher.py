"""How pixel-space teachers are trained: small pictures by class, such as Fashion-MNIST in minutes on a CPU or CIFAR-10 on a GPU."""

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..atomic import write_json
from ..backbones import miniature
from ..backbones.unconditional import pixel_unet, save_pixel_model
from ..training.fit import FitConfig, FitStep, fit
from ..training.loop import default_device
from ..training.state import seeded
from .pixel_data import read_pixel_data
from .teacher import Strict


class PixelTeacherConfig(Strict):
    """`recipes/fashion-teacher.yaml`, `recipes/cifar10-teacher.yaml`. `data` as in `pixel_data.read_pixel_data`."""

    kind: Literal["pixel-teacher"]
    seed: int
    data: str
    channels: list[int]
    attention: list[bool]
    layers: int = Field(default=1, ge=1)
    groups: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False
    drop_label: float = Field(default=0.1, ge=0, le=1)
    fit: FitConfig


def train_pixel_teacher(config: PixelTeacherConfig, run: Path) -> Generator[tuple[str, FitStep], None, None]:
    """Fit the U-Net to `v` at uniform times, on the GPU where there is one; resumes; ends with `run/teacher`, an ordinary pipeline folder."""
    data, device = read_pixel_data(config.data), default_device()
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", config.model_dump())
    images, labels = data.images.to(device), data.labels.to(device)
    none = len(data.classes)  # the label of no class
    torch.manual_seed(config.seed)
    net = pixel_unet(
        config.channels, config.attention, images.shape[1], images.shape[-1], none, config.groups, config.layers, config.dropout
    ).to(device)
    average = copy.deepcopy(net).eval()
    alpha_bar = miniature.scheduler().alphas_cumprod.to(device)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def loss_at(step: int) -> Tensor:
        rng, n = seeded(config.seed, step, "pixels", device=device), config.fit.batch
        rows = torch.randint(len(images), (n,), generator=rng, device=device)
        label = torch.where(torch.rand(n, generator=rng, device=device) < config.drop_label, none, labels[rows])
        t = ((torch.arange(n, device=device) + torch.rand(n, generator=rng, device=device)) / n * len(alpha)).long()
        x0 = images[rows].float() / 127.5 - 1
        if config.flip:
            x0 = torch.where(torch.rand((n, 1, 1, 1), generator=rng, device=device) < 0.5, x0, x0.flip(3))
        eps = torch.randn(x0.shape, generator=rng, device=device)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bf16):
            v = net(a * x0 + s * eps, t, class_labels=label if none else None, return_dict=False)[0]
        return F.mse_loss(v.float(), a * eps - s * x0)

    yield from (("denoiser", s) for s in fit(net, average, loss_at, config.fit, run / "denoiser"))
    save_pixel_model(run / "teacher", average.cpu(), miniature.scheduler(), data.classes)
    (run / "teacher" / "prompts.txt").write_text("\n".join(data.classes) + "\n")
