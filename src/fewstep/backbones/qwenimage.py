"""Qwen-Image: packed latents and masked text of a language model.

The autoencoder is one for videos. Guidance keeps the norm of every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from .base import Cond
from .family import ComfyParts, Family
from .flow_transformer import TEXT, FlowTransformer, pack, unpack
from .parts import on, single_output, transformer_features
from .settings import require_channels, require_flow, same

BLANK = " "  # negative prompt of the model's owners


@dataclass(frozen=True)
class QwenImage(FlowTransformer):
    """A `QwenImagePipeline` as a backbone.

    States are normalised latents [C, h, w]. The condition is `text [B, L, D]` with `mask [B, L]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def guidance_patch(self) -> int:
        return self.patch

    @property
    def time_layer(self) -> str:
        return "time_text_embed.timestep_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        # A block returns a pair, text and image. The image's feed-forward layer returns one tensor.
        return transformer_features(self.pipe.transformer.transformer_blocks, ".img_mlp")

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["text"], x.shape[-2:]
        with single_output(module):
            tokens = module(
                pack(x).to(text.dtype),
                text,
                cond["mask"],
                t.to(torch.float32),
                [[(1, height // 2, width // 2)]] * len(x),
                return_dict=False,
            )[0]
        return unpack(tokens, height, width).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        pipe, start = self.pipe, self.pipe.prompt_template_encode_start_idx
        told = [pipe.prompt_template_encode.format(p or BLANK) for p in prompts]
        words = pipe.tokenizer(
            told, max_length=TEXT + start, padding=True, truncation=True, padding_side="right", return_tensors="pt"
        ).to(pipe.text_encoder.device)
        with torch.no_grad():
            # The pipeline keeps the words that the mask keeps. With padding on the right, these are the first.
            seen = pipe.text_encoder(**words, output_hidden_states=True).hidden_states[-1]
        mask = words.attention_mask[:, start:]
        text = (seen[:, start:] * mask[..., None]).to(pipe.text_encoder.dtype)
        rest = TEXT - mask.shape[1]
        return on(self.module, {"text": pad(text, (0, 0, 0, rest)), "mask": pad(mask, (0, rest)).bool()})


def check(pipe: QwenImagePipeline) -> None:
    """Check the settings of a Qwen-Image pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.z_dim)
    config = pipe.transformer.config
    for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        same("transformer", key, bool(config.get(key)), False, "text-to-image has no such input", "pass Qwen-Image")
    same("transformer", "patch_size", config.patch_size, 2, "its pipeline packs patches of 2")


FAMILY = Family(
    QwenImagePipeline,
    QwenImage.of,
    told_by="sigmas",
    guidance=lambda scale, count: {"true_cfg_scale": scale, "negative_prompt": [BLANK] * count if scale > 1 else None},
    latents=pack,
    patch=2,
    check=check,
    comfyui_parts=lambda pipe: ComfyParts(
        "EmptySD3LatentImage",
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "qwen_image",
        "qwen_image_vae.safetensors",
        shift="",
    ),
)
