"""Stable Diffusion XL: two text encoders, pooled text, size conditions.

The network is conditioned on the sizes that the image is said to have had.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from .base import Cond
from .family import Family
from .original_names import original_names
from .parts import LatentUNet, SizeConditioned, on, single_output
from .settings import table


@dataclass(frozen=True)
class StableDiffusionXL(LatentUNet, SizeConditioned):
    """A `StableDiffusionXLPipeline` as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]`, `pooled [B, P]` and
    `sizes [B, 6]`: original height and width, crop, height and width.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]}
        states = x.to(cond["text"].dtype)
        with single_output(module):
            return module(states, t.to(torch.float32), cond["text"], added_cond_kwargs=added, return_dict=False)[
                0
            ].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
            )
        if self.pipe.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(p) for p in prompts], device=text.device)
            text, pooled = text * said[:, None, None], pooled.to(said.device) * said[:, None]
        return {**on(self.module, {"text": text, "pooled": pooled}), **self.size_conditions(len(prompts))}

    def size_conditions(self, count: int) -> dict[str, Tensor]:
        side, kind = self.image_size, self.pipe.text_encoder.dtype
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=kind, device=next(self.module.parameters()).device)
        return {"sizes": sizes.expand(count, -1)}


FAMILY = Family(
    StableDiffusionXLPipeline,
    lambda pipe, name: StableDiffusionXL(pipe, name, table(pipe)),
    original_names=original_names,
    comfyui_latent="EmptyLatentImage",
    kohya="original",
)
