"""PixArt-alpha and PixArt-Sigma: masked T5 text, a transformer with learned variance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from .base import Cond
from .family import Family
from .parts import LatentTransformer, on, single_output, transformer_features
from .settings import table


@dataclass(frozen=True)
class PixArt(LatentTransformer):
    """A PixArt pipeline as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]` with `mask [B, L]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def time_layer(self) -> str:
        return "adaln_single.emb.timestep_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return transformer_features(self.pipe.transformer.transformer_blocks)

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, size = cond["text"], self.image_size
        extra: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.pipe.transformer.config.use_additional_conditions:
            extra = {"resolution": text.new_full((len(x), 2), size), "aspect_ratio": text.new_ones(len(x), 1)}
        states, times = x.to(text.dtype), t.to(torch.float32)
        with single_output(module):
            output = module(
                states, text, times, encoder_attention_mask=cond["mask"], added_cond_kwargs=extra, return_dict=False
            )[0]
        return output[:, : x.shape[1]].float()  # the other half, where there is one, is the learned variance

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, mask, _, _ = self.pipe.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
            )
        # Attention gives the padding no weight: zeros, which a cache need not store, give the same output.
        return on(self.module, {"text": text.masked_fill(mask[..., None] == 0, 0), "mask": mask})


ALPHA, SIGMA = (
    Family(
        pipeline,
        lambda pipe, name: PixArt(pipe, name, table(pipe)),
        call_options=lambda pipe: {"use_resolution_binning": False, "clean_caption": False},
    )
    for pipeline in (PixArtAlphaPipeline, PixArtSigmaPipeline)
)
