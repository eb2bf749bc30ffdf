"""Pixel-space models: diffusers' `UNet2DModel`, unconditional or with classes.

The schedule is a table of noise levels, or EDM's with its preconditioning.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from torch import Tensor, nn

from ..core.prediction import edm_inputs
from ..core.schedule import EDM
from .base import Cond
from .family import Family
from .modules import dtype_of
from .parts import PREDICTIONS, WithUNet, single_output
from .schedulers import EDM_SCHEDULERS, EDM_SIGNS, process_of
from .settings import read_labels, require_pixels, require_prediction

LABELS = "labels.json"  # class names, next to model_index.json; the network has one more class, for no class

SHOWN = 20  # classes that are listed to a person


@dataclass(frozen=True)
class PixelModel(WithUNet):
    """A pixel-space U-Net as a backbone.

    States are images [C, H, W] in [-1, 1]. With classes, a prompt is a class name and the empty prompt is no
    class. On EDM's schedule, the network is F of EDM's preconditioning, with the `sigma_data` of the
    pipeline's scheduler.
    """

    labels: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.pipe.unet.config.sample_size
        return (self.pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def image_size(self) -> int:
        return self.shape[-1]

    @property
    def classes(self) -> str:
        """Names of the classes for a person to read.

        The first `SHOWN` of many.
        """
        rest = len(self.labels) - SHOWN
        return ", ".join(self.labels[:SHOWN]) + (f" and {rest} more, in {LABELS}" if rest > 0 else "")

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return []

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = dtype_of(module)
        if isinstance(self.schedule, EDM):
            x, t = edm_inputs(x, t, self.pipe.scheduler.config.sigma_data)
        with single_output(module):
            return module(x.to(dtype), t.to(torch.float32), class_labels=cond.get("label"), return_dict=False)[
                0
            ].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        if not self.labels:
            return {}
        numbers = {name: i for i, name in enumerate(self.labels)} | {"": len(self.labels)}
        if unknown := [p for p in prompts if p not in numbers]:
            raise ValueError(f"prompts: {self.name} knows no {unknown[0]!r}; its classes are {self.classes}")
        return {"label": torch.tensor([numbers[p] for p in prompts], device=self.pipe.device)}

    def encode_images(self, images: Tensor) -> Tensor:
        grey = self.pipe.unet.config.in_channels == 1
        return 2 * (images.mean(1, keepdim=True) if grey else images) - 1

    def decode(self, x: Tensor) -> Tensor:
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def around_pixels(pipe: DiffusionPipeline, name: str) -> PixelModel:
    """Return the backbone of a pixel pipeline, with its class names.

    `labels.json` in the pipeline's folder names the classes. Raises ValueError for a scheduler of another
    kind.
    """
    labels = read_labels(Path(pipe.name_or_path or "") / LABELS)
    require_pixels(pipe.unet, labels)
    if "prediction_type" in pipe.scheduler.config:
        require_prediction(pipe, tuple(EDM_SIGNS if "sigma_data" in pipe.scheduler.config else PREDICTIONS))
    schedule = process_of(pipe.scheduler)
    if isinstance(schedule, EDM) and isinstance(pipe, DDPMPipeline):  # samples other images than the model's
        kept, pipe = pipe.name_or_path, pixel_pipeline(pipe.unet, pipe.scheduler)
        pipe.register_to_config(_name_or_path=kept)
        pipe.set_progress_bar_config(disable=True)
    return PixelModel(pipe, name, schedule, labels)


def pixel_pipeline(unet: UNet2DModel, scheduler: SchedulerMixin, told: bool = False) -> DiffusionPipeline:
    """Return the diffusers pipeline that samples what the model does.

    `DDPMPipeline` neither scales noise and inputs as EDM's schedulers ask, nor can be conditioned on a class.
    For EDM's schedulers, and where a class is `told`, `ConsistencyModelPipeline` does both.
    """
    return (ConsistencyModelPipeline if told or isinstance(scheduler, EDM_SCHEDULERS) else DDPMPipeline)(
        unet=unet, scheduler=scheduler
    )


def edm_scheduler(sigma_data: float) -> EDMEulerScheduler:
    """Return the noise levels of a new model with EDM's preconditioning."""
    return EDMEulerScheduler(sigma_data=sigma_data)


def pixel_unet(
    channels: Sequence[int],
    attention: Sequence[bool],
    in_channels: int,
    size: int,
    classes: int,
    groups: int = 8,
    layers: int = 1,
    dropout: float = 0.0,
) -> UNet2DModel:
    """Return a small pixel U-Net with random weights.

    With `classes` labels, and one more for no class.
    """
    return UNet2DModel(
        sample_size=size, in_channels=in_channels, out_channels=in_channels, block_out_channels=tuple(channels),
        layers_per_block=layers, dropout=dropout, norm_num_groups=groups,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention), attention_head_dim=8,
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        num_class_embeds=classes + 1 if classes else None, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def save_pixel_model(folder: Path, net: UNet2DModel, scheduler: SchedulerMixin, labels: Sequence[str]) -> None:
    """Write a model as a pipeline folder in half precision.

    The class names are written next to the model.
    """
    save_pixel_pipeline(folder, pixel_pipeline(copy.deepcopy(net).eval().half(), scheduler), labels)


def save_pixel_pipeline(folder: Path, pipe: DiffusionPipeline, labels: Sequence[str]) -> None:
    """Write a pipeline's folder, with the class names next to it."""
    pipe.save_pretrained(folder)
    if labels:
        (folder / LABELS).write_text(json.dumps(list(labels)) + "\n", encoding="utf-8")


def drawn_pixels(model: PixelModel, prompts: Sequence[str], steps: int) -> Tensor:
    """Sample images with the model's own diffusers pipeline.

    One for each prompt, from seeds 0, 1, and so on. Returns images [B, 3, H, W] in [0, 1].
    """
    options: dict[str, Any] = {"class_labels": model.encode(prompts)["label"]} if model.labels else {}
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    shown = model.pipe(
        batch_size=len(prompts), num_inference_steps=steps, generator=generators, output_type="pt", **options
    ).images
    return model.decode(2 * shown - 1)


DDPM, CONSISTENCY = (
    Family(pipeline, around_pixels, takes_prompts=False, takes_times=False)
    for pipeline in (DDPMPipeline, ConsistencyModelPipeline)
)
