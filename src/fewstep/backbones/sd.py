"""Stable Diffusion 1.x, 2.x and their fine-tunes: one text encoder, a conditional U-Net, an image autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ..core.schedule import VP
from .base import Cond
from .parts import LatentUNet


@dataclass(frozen=True)
class StableDiffusion(LatentUNet):
    """A `StableDiffusionPipeline` as a backbone. States are scaled latents [C, h, w]; the condition is `text [B, L, D]`."""

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = cond["text"].dtype
        return module(x.to(dtype), t.to(torch.float32), encoder_hidden_states=cond["text"], return_dict=False)[0].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        with torch.no_grad():
            return {"text": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0].to(self.pipe.unet.device)}


def around_sd(pipe: StableDiffusionPipeline, name: str) -> StableDiffusion:
    """The backbone of a pipeline."""
    return StableDiffusion(pipe, name, VP(pipe.scheduler.alphas_cumprod.double()))
