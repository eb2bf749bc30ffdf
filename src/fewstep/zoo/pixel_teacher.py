"""Training of pixel-space teachers on small images with classes.

Fashion-MNIST trains in minutes on a CPU, CIFAR-10 on a GPU.
"""

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..atomic import write_json
from ..backbones import miniature
from ..backbones.schedulers import process_of
from ..backbones.unconditional import PixelModel, edm_scheduler, pixel_pipeline, pixel_unet, save_pixel_model
from ..core.prediction import target
from ..core.schedule import EDM, Schedule, diffuse, expand
from ..reading import read_json
from ..training.fit import FitConfig, FitStep, fit
from ..training.loop import default_device
from ..training.state import seeded
from .pixel_data import read_pixel_data
from .teacher import Strict

LOG_SIGMA = (-1.2, 1.2)  # mean and standard deviation of log sigma in training (EDM, tab. 1)


class PixelTeacherConfig(Strict):
    """Settings of `recipes/fashion-teacher.yaml` and `recipes/cifar10-teacher.yaml`.

    `data` is as in `pixel_data.read_pixel_data`. `process` is `vp`, the cosine table of 1000 times and v, or
    `edm`, noise levels with EDM's preconditioning for data of standard deviation `sigma_data`.
    """

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
    process: Literal["vp", "edm"] = "vp"
    sigma_data: float = Field(default=0.5, gt=0)
    fit: FitConfig

    @model_validator(mode="after")
    def _edm_alone(self) -> "PixelTeacherConfig":
        if self.process != "edm" and "sigma_data" in self.model_fields_set:
            raise ValueError(
                f"sigma_data: got {self.sigma_data:g} with process {self.process}, which has none; "
                "leave it out, or set process=edm"
            )
        return self


def train_pixel_teacher(config: PixelTeacherConfig, run: Path) -> Generator[tuple[str, FitStep], None, None]:
    """Train a pixel U-Net and write its pipeline folder, `run/teacher`.

    On the GPU where there is one. Resumes a stopped run. The loss is the mean square error of the raw output:
    of v at uniform times, or of EDM's F at noise levels with a log-normal law, which is EDM's weighting
    `1 / c_out^2` of the clean estimate's error (EDM, eq. 8). Raises ValueError where the run was started with
    another process.
    """
    if (record := run / "run.json").exists() and (
        begun := read_json(record, f"delete {run}").get("process", "vp")
    ) != config.process:
        raise ValueError(
            f"process: got {config.process}, the run in {run} was begun with {begun}; "
            "pass --out with another folder, or delete it"
        )
    data, device = read_pixel_data(config.data), default_device()
    run.mkdir(parents=True, exist_ok=True)
    write_json(record, config.model_dump())
    images, labels = data.images.to(device), data.labels.to(device)
    none = len(data.classes)  # the label of no class
    torch.manual_seed(config.seed)
    net = pixel_unet(
        config.channels,
        config.attention,
        images.shape[1],
        images.shape[-1],
        none,
        config.groups,
        config.layers,
        config.dropout,
    ).to(device)
    average = copy.deepcopy(net).eval()
    scheduler = edm_scheduler(config.sigma_data) if config.process == "edm" else miniature.scheduler()
    schedule = process_of(scheduler)
    model = PixelModel(pixel_pipeline(net, scheduler), "teacher", schedule, data.classes)

    def loss_at(step: int) -> Tensor:
        rng, n = seeded(config.seed, step, "pixels", device=device), config.fit.batch
        rows = torch.randint(len(images), (n,), generator=rng, device=device)
        label = torch.where(torch.rand(n, generator=rng, device=device) < config.drop_label, none, labels[rows])
        t = draw_times(schedule, n, rng)
        x0 = images[rows].float() / 127.5 - 1
        if config.flip:
            x0 = torch.where(torch.rand((n, 1, 1, 1), generator=rng, device=device) < 0.5, x0, x0.flip(3))
        eps = torch.randn(x0.shape, generator=rng, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.fit.bf16):
            raw = model.predict(net, diffuse(schedule, x0, t, eps), t, {"label": label} if none else {})
        return F.mse_loss(raw, target(x0, eps, expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0), model.row))

    yield from (("denoiser", s) for s in fit(net, average, loss_at, config.fit, run / "denoiser"))
    save_pixel_model(run / "teacher", average.cpu(), scheduler, data.classes)
    (run / "teacher" / "prompts.txt").write_text("\n".join(data.classes) + "\n", encoding="utf-8")


def draw_times(schedule: Schedule, n: int, rng: torch.Generator) -> Tensor:
    """Sample times of a batch [n], one per slice of their law.

    Log-normal noise levels on EDM's schedule, or else uniform on a table. The slices halve the noise of the
    loss.
    """
    # Double precision: single rounds the top of the last slice up to 1, beyond the table, about once in 100,000
    # batches.
    u = (torch.arange(n, dtype=torch.float64, device=rng.device) + torch.rand(n, generator=rng, device=rng.device)) / n
    if isinstance(schedule, EDM):
        mean, spread = LOG_SIGMA
        return (mean + spread * torch.special.ndtri(u)).exp().clamp(schedule.t_min, schedule.t_max)
    return (u * (schedule.t_max + 1)).floor()
