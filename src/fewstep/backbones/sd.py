"""Stable Diffusion 1.x, 2.x and their fine-tunes: one text encoder, a conditional U-Net, an image autoencoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ..core.prediction import Row, row_named
from ..core.schedule import VP, Schedule
from .base import Cond

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> rows


def unet_features(unet: nn.Module) -> tuple[str, ...]:
    """The last convolution block of every downward level, and the middle."""
    levels = unet.get_submodule("down_blocks")
    assert isinstance(levels, nn.ModuleList)
    last = [f"down_blocks.{i}.resnets.{len(level.get_submodule('resnets')) - 1}" for i, level in enumerate(levels)]  # type: ignore[arg-type]
    return (*last, "mid_block")


@dataclass(frozen=True)
class StableDiffusion:
    """A `StableDiffusionPipeline` as a backbone. States are scaled latents [C, h, w]; the condition is `text [B, L, D]`."""

    pipe: StableDiffusionPipeline
    name: str
    schedule: Schedule

    @property
    def module(self) -> nn.Module:
        return self.pipe.unet

    @property
    def row(self) -> Row:
        return row_named(PREDICTIONS[self.pipe.scheduler.config.prediction_type])

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.pipe.unet.config.sample_size
        return (self.pipe.unet.config.in_channels, size, size)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.pipe.scheduler.config)

    @property
    def picture_size(self) -> int:
        return self.pipe.unet.config.sample_size * 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def time_layer(self) -> str:
        return "time_embedding.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return unet_features(self.pipe.unet)

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = cond["text"].dtype
        return module(x.to(dtype), t.to(torch.float32), encoder_hidden_states=cond["text"], return_dict=False)[0].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        with torch.no_grad():
            return {"text": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]}

    def picture_states(self, pictures: Tensor) -> Tensor:
        vae = self.pipe.vae
        with torch.no_grad():
            means = [vae.encode(2 * x - 1).latent_dist.mean for x in pictures.to(vae.device, vae.dtype).split(32)]
        return torch.cat(means).float() * vae.config.scaling_factor

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        with torch.no_grad():
            images = torch.cat([vae.decode(z / vae.config.scaling_factor, return_dict=False)[0] for z in x.to(vae.dtype).split(32)])
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_sd(folder: str | Path, name: str, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """A `StableDiffusionPipeline` from a folder or a hub id. Raises ValueError with one line when it is neither."""
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
        if part.dtype != dtype:
            part.to(dtype=dtype)
    return around(pipe, name)


def around(pipe: StableDiffusionPipeline, name: str) -> StableDiffusion:
    """The backbone of a pipeline that is there already."""
    return StableDiffusion(pipe, name, VP(pipe.scheduler.alphas_cumprod.double()))
