"""How the tiny pixel-space teacher was trained: Fashion-MNIST by class, for tests and experiments that take seconds."""

import copy
import gzip
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..atomic import write_json
from ..backbones import miniature
from ..backbones.unconditional import pixel_unet, save_pixel_model
from ..training.fit import FitConfig, FitStep, fit
from ..training.state import seeded
from .teacher import Strict

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class PixelTeacherConfig(Strict):
    """`recipes/fashion-teacher.yaml`. `folder` holds Debian's `dataset-fashion-mnist` (the four gzipped IDX files)."""

    kind: Literal["pixel-teacher"]
    seed: int
    folder: str
    channels: list[int]
    attention: list[bool]
    drop_label: float
    fit: FitConfig


def load_idx(path: Path) -> Tensor:
    """An IDX file of bytes. Raises ValueError when it is not there or not one."""
    try:
        data = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"folder: cannot read {path} ({error.strerror or error}); install Debian's dataset-fashion-mnist, or set folder=PATH"
        ) from error
    ranks = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(ranks)]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * ranks).reshape(shape).copy())


def train_pixel_teacher(config: PixelTeacherConfig, run: Path) -> Generator[tuple[str, FitStep], None, None]:
    """Fit the U-Net to `v` at uniform times; resumes; ends with `run/teacher`, an ordinary pipeline folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", config.model_dump())
    images = load_idx(Path(config.folder) / "train-images-idx3-ubyte.gz")[:, None].float() / 127.5 - 1
    labels = load_idx(Path(config.folder) / "train-labels-idx1-ubyte.gz").long()
    torch.manual_seed(config.seed)
    net = pixel_unet(config.channels, config.attention, 1, images.shape[-1], len(CLASSES))
    average = copy.deepcopy(net)
    alpha_bar = miniature.scheduler().alphas_cumprod
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def loss_at(step: int) -> Tensor:
        rng, n = seeded(config.seed, step, "pixels"), config.fit.batch
        rows = torch.randint(len(images), (n,), generator=rng)
        label = torch.where(torch.rand(n, generator=rng) < config.drop_label, len(CLASSES), labels[rows])
        t = ((torch.arange(n) + torch.rand(n, generator=rng)) / n * len(alpha)).long()
        x0, eps = images[rows], torch.randn((n, *images.shape[1:]), generator=rng)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.fit.bf16):
            v = net(a * x0 + s * eps, t, class_labels=label, return_dict=False)[0]
        return F.mse_loss(v.float(), a * eps - s * x0)

    yield from (("denoiser", s) for s in fit(net, average, loss_at, config.fit, run / "denoiser"))
    save_pixel_model(run / "teacher", average, miniature.scheduler(), CLASSES)
    (run / "teacher" / "prompts.txt").write_text("\n".join(CLASSES) + "\n")
