"""Z-Image: one stream of latents and text.

Time is counted from noise to data. The network predicts data minus noise, and takes lists of images and texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from transformers import Qwen3Model

from .base import Cond
from .family import ComfyParts, Family
from .flow_transformer import TEXT, FlowTransformer, lengths
from .layouts import Layout
from .parts import on, single_output, transformer_features
from .settings import require_channels, require_flow, same

BLOCK = {  # layers that the original code names otherwise; queries, keys and values are one layer in it
    "attention.to_q": "attention.qkv", "attention.to_k": "attention.qkv", "attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
}  # fmt: skip
LAYOUT = Layout(
    outside={
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
    blocks={name: (name, BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
)


@dataclass(frozen=True)
class ZImage(FlowTransformer):
    """A `ZImagePipeline` as a backbone.

    States are scaled latents [C, h, w]. The condition is `text [B, L, D]` with `mask [B, L]`.
    """

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def channels(self) -> int:
        return int(self.pipe.transformer.config.in_channels)  # the network packs patches by itself

    @property
    def time_layer(self) -> str:
        return "t_embedder.mlp.2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return transformer_features(self.pipe.transformer.layers, called="layers")

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text = cond["text"]
        texts = [row[:count] for row, count in zip(text, lengths(cond["mask"]), strict=True)]
        images = list(x.to(text.dtype).unsqueeze(2).unbind())
        with single_output(module):
            found = module(images, (1 - t).to(torch.float32), texts, return_dict=False)[0]
        return -torch.stack(found).squeeze(2).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        pipe = self.pipe
        told = [
            pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for p in prompts
        ]
        words = pipe.tokenizer(
            told, max_length=TEXT, padding="max_length", truncation=True, padding_side="right", return_tensors="pt"
        ).to(pipe.text_encoder.device)
        with torch.no_grad():
            seen = pipe.text_encoder(
                words.input_ids, attention_mask=words.attention_mask.bool(), output_hidden_states=True
            ).hidden_states[-2]
        mask = words.attention_mask.bool()
        return on(self.module, {"text": seen * mask[..., None], "mask": mask})


def check(pipe: ZImagePipeline) -> None:
    """Check the settings of a Z-Image pipeline. Raises UnfitError."""
    require_flow(pipe)
    require_channels(pipe, pipe.vae.config.latent_channels, patch=1)
    config = pipe.transformer.config
    same("transformer", "all_patch_size", list(config.all_patch_size), [2], "its pipeline asks for patches of 2")
    same("transformer", "all_f_patch_size", list(config.all_f_patch_size), [1], "its pipeline asks for single frames")
    same("transformer", "siglip_feat_dim", config.get("siglip_feat_dim"), None, "it edits images", "pass Z-Image")


FAMILY = Family(
    ZImagePipeline,
    ZImage.of,
    told_by="sigmas",
    guidance=lambda scale, count: {"guidance_scale": scale - 1},  # cond + g (cond - null)
    kinds={"text_encoder": Qwen3Model},
    check=check,
    original_names=LAYOUT.names,
    comfyui_parts=lambda pipe: ComfyParts(
        "EmptySD3LatentImage", "qwen_3_4b.safetensors", "lumina2", "ae.safetensors", shift=""
    ),
)
