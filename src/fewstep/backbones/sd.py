"""Stable Diffusion 1.x, 2.x and their fine-tunes: one text encoder, a conditional U-Net, an image autoencoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ..core.prediction import Row
from ..core.schedule import VP, Schedule
from .base import Cond
from .parts import latents_of, pictures_of, row_of, unet_features


@dataclass(frozen=True)
class StableDiffusion:
    """A `StableDiffusionPipeline` as a backbone. States are scaled latents [C, h, w]; the condition is `text [B, L, D]`."""

    pipe: StableDiffusionPipeline
    name: str
    schedule: Schedule
    size: int = 0  # height and width of the latents; 0: as the network was made for

    @property
    def module(self) -> nn.Module:
        return self.pipe.unet

    @property
    def row(self) -> Row:
        return row_of(self.pipe)

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.size or self.pipe.unet.config.sample_size
        return (self.pipe.unet.config.in_channels, size, size)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.pipe.scheduler.config)

    @property
    def picture_size(self) -> int:
        return self.shape[-1] * self.pipe.vae_scale_factor

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
            return {"text": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0].to(self.pipe.unet.device)}

    def picture_states(self, pictures: Tensor) -> Tensor:
        return latents_of(self.pipe.vae, pictures)

    def decode(self, x: Tensor) -> Tensor:
        return pictures_of(self.pipe.vae, x)


def around_sd(pipe: StableDiffusionPipeline, name: str) -> StableDiffusion:
    """The backbone of a pipeline."""
    return StableDiffusion(pipe, name, VP(pipe.scheduler.alphas_cumprod.double()))
