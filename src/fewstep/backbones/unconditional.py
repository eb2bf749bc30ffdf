"""Pixel-space models: diffusers' `UNet2DModel`, unconditional or with classes, as `DDPMPipeline` folders."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from ..core.schedule import VP
from .base import Cond
from .parts import WithUNet

LABELS = "labels.json"  # class names beside model_index.json; one more class than names is the unconditional one

SHOWN = 20  # classes that are listed to a person


@dataclass(frozen=True)
class PixelModel(WithUNet):
    """States are pictures [C, H, W] in [-1, 1]. With classes a prompt is a class name and the empty prompt is no class."""

    labels: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.pipe.unet.config.sample_size
        return (self.pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def picture_size(self) -> int:
        return self.shape[-1]

    @property
    def classes(self) -> str:
        """Their names as a person reads them, the first ones of many."""
        rest = len(self.labels) - SHOWN
        return ", ".join(self.labels[:SHOWN]) + (f" and {rest} more, in {LABELS}" if rest > 0 else "")

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return []

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = next(module.parameters()).dtype
        return module(x.to(dtype), t.to(torch.float32), class_labels=cond.get("label"), return_dict=False)[0].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        if not self.labels:
            return {}
        numbers = {name: i for i, name in enumerate(self.labels)} | {"": len(self.labels)}
        if unknown := [p for p in prompts if p not in numbers]:
            raise ValueError(f"prompts: {self.name} knows no {unknown[0]!r}; its classes are {self.classes}")
        return {"label": torch.tensor([numbers[p] for p in prompts], device=self.pipe.device)}

    def picture_states(self, pictures: Tensor) -> Tensor:
        grey = self.pipe.unet.config.in_channels == 1
        return 2 * (pictures.mean(1, keepdim=True) if grey else pictures) - 1

    def decode(self, x: Tensor) -> Tensor:
        pictures = (x.float() / 2 + 0.5).clamp(0, 1)
        return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures


def around_pixels(pipe: DDPMPipeline, name: str) -> PixelModel:
    """The backbone of a pipeline, with the classes that `labels.json` in its folder names."""
    names = Path(pipe.name_or_path or "") / LABELS
    labels = tuple(json.loads(names.read_text())) if names.is_file() else ()
    return PixelModel(pipe, name, VP(pipe.scheduler.alphas_cumprod.double()), labels)


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
    """A small pixel U-Net with `classes` labels and one more for none, random weights."""
    return UNet2DModel(
        sample_size=size, in_channels=in_channels, out_channels=in_channels, block_out_channels=tuple(channels), layers_per_block=layers, dropout=dropout, norm_num_groups=groups,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention), attention_head_dim=8,
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)), num_class_embeds=classes + 1 if classes else None,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def save_pixel_model(folder: Path, net: UNet2DModel, scheduler: DDIMScheduler, labels: Sequence[str]) -> None:
    """The model as an ordinary pipeline folder in half precision, class names beside."""
    DDPMPipeline(unet=copy.deepcopy(net).eval().half(), scheduler=scheduler).save_pretrained(folder)
    save_labels(folder, labels)


def save_labels(folder: Path, labels: Sequence[str]) -> None:
    """Class names beside a pipeline's parts, where there are any."""
    if labels:
        (folder / LABELS).write_text(json.dumps(list(labels)) + "\n")
