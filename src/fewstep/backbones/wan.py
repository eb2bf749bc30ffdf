"""Wan 2.1 and 2.2: rectified flow of video latents.

Times are shifted, and the text has 512 tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from .base import Cond
from .experts import Experts, joined
from .family import ComfyParts, Family
from .layouts import Layout
from .parts import SizedVideo, on, single_output, transformer_features
from .settings import flow
from .sizes import VideoSize, call_options

TOKENS = 512  # of a text; what is behind its end are zeros, which the network sees
LAYOUT = Layout(  # of the original program
    outside={
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "patch_embedding": "patch_embedding",
        "proj_out": "head.head",
    },
    blocks={
        "blocks": (
            "blocks",
            {
                f"{ours}.{layer}": f"{theirs}.{name}"
                for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
                for layer, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
            }
            | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
        )
    },
)


@dataclass(frozen=True)
class Wan(SizedVideo):
    """A `WanPipeline` as a backbone.

    States are scaled latents [C, T, h, w]. The condition is `text [B, L, D]`. `decode` gives videos
    [B, F, 3, H, W]. Wan 2.2-5B is told a time for every patch by its pipeline, all the same for text-to-video: one
    time a video gives the same numbers. Wan 2.2-A14B has two networks, which are one here (see `experts`).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.video
        scale, every = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        channels = self.pipe.transformer.config.in_channels
        return (channels, (size.frames - 1) // every + 1, size.height // scale, size.width // scale)

    @property
    def usual(self) -> VideoSize:
        return usual_size(self.pipe)

    @property
    def fps(self) -> int:
        return _fps(self.pipe)

    @property
    def unit(self) -> tuple[int, int, int]:
        along, high, wide = self.pipe.transformer.config.patch_size
        scale = self.pipe.vae_scale_factor_spatial
        return wide * scale, high * scale, along * self.pipe.vae_scale_factor_temporal

    @property
    def largest(self) -> VideoSize:
        return largest(self.pipe)

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.pipe.text_encoder]

    @property
    def time_layer(self) -> str:
        # Of two networks none has the layer for both.
        return "" if isinstance(self.module, Experts) else "condition_embedder.time_embedder.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        blocks = () if isinstance(self.module, Experts) else self.pipe.transformer.blocks
        return transformer_features(blocks, called="blocks") if blocks else ()

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        times = t.to(torch.float32) * self.pipe.scheduler.config.num_train_timesteps
        with single_output(module):
            return module(x.to(cond["text"].dtype), times, cond["text"], return_dict=False)[0].float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=TOKENS,
                device=self.pipe.text_encoder.device,
            )
        return on(self.module, {"text": text})

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(v, device=x.device).view(1, -1, 1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        z = (x.float() * std + mean).to(vae.device, vae.dtype)
        # One video at a time: an autoencoder for video needs more memory than the transformer.
        with torch.no_grad():
            videos = torch.cat([vae.decode(one, return_dict=False)[0] for one in z.split(1)])
        return (videos.float() / 2 + 0.5).clamp(0, 1).movedim(1, 2)


def largest(pipe: WanPipeline) -> VideoSize:
    """Return the largest size for which a network has positions."""
    config, scale = pipe.transformer.config, pipe.vae_scale_factor_spatial
    along, high, wide = (config.rope_max_seq_len * side for side in config.patch_size)
    return VideoSize(wide * scale, high * scale, (along - 1) * pipe.vae_scale_factor_temporal + 1)


def usual_size(pipe: WanPipeline) -> VideoSize:
    """Return the size that `pipe(prompt)` draws.

    Or the largest that the network has positions for.
    """
    told = inspect.signature(WanPipeline.__call__).parameters
    usual = VideoSize(*(told[name].default for name in ("width", "height", "num_frames")))
    return VideoSize(*map(min, usual, largest(pipe)))


def _call_options(pipe: Any) -> Mapping[str, int]:
    return call_options(str(usual_size(pipe)))


def _fps(pipe: Any) -> int:
    return 24 if pipe.config.expand_timesteps else 16


def _comfyui_parts(pipe: Any) -> ComfyParts:
    encoder = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    if pipe.config.expand_timesteps:  # Wan 2.2-5B
        return ComfyParts("Wan22ImageToVideoLatent", encoder, "wan", "wan2.2_vae.safetensors", True, fps=_fps(pipe))
    return ComfyParts("EmptyHunyuanLatentVideo", encoder, "wan", "wan_2.1_vae.safetensors", fps=_fps(pipe))


FAMILY = Family(
    WanPipeline,
    lambda pipe, name: Wan(joined(pipe), name, flow(pipe)),
    told_by="",
    video=True,
    call_options=_call_options,
    original_names=LAYOUT.names,
    writes_original=True,
    comfyui_parts=_comfyui_parts,
)
