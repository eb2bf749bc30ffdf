"""Stable Diffusion 1.x, 2.x and their fine-tunes.

One text encoder, a conditional U-Net, an image autoencoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from .base import Cond
from .family import Family
from .original_names import original_names
from .parts import LatentUNet, on, single_output
from .settings import table


@dataclass(frozen=True)
class StableDiffusion(LatentUNet):
    """A `StableDiffusionPipeline` as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = cond["text"].dtype
        with single_output(module):
            return module(x.to(dtype), t.to(torch.float32), encoder_hidden_states=cond["text"], return_dict=False)[
                0
            ].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        device = self.pipe.text_encoder.device
        with torch.no_grad():  # the pipeline's own encoding knows words of several tokens
            text, _ = self.pipe.encode_prompt(
                list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return on(self.module, {"text": text})


FAMILY = Family(
    StableDiffusionPipeline,
    lambda pipe, name: StableDiffusion(pipe, name, table(pipe)),
    parts={"safety_checker": None, "requires_safety_checker": False},
    original_names=original_names,
    comfyui_latent="EmptyLatentImage",
    kohya="diffusers",
)
