"""A CogVideoX pipeline in miniature: the same classes, a few million parameters, one token a word.

Built from plain numbers, so that a tiny video teacher is the very thing that `CogVideoXPipeline.from_pretrained` loads, and so that tests
can have one with random weights in milliseconds.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .weights import load_network

COMPRESSION = 4  # of time, as in CogVideoX: 4 n + 1 frames are n + 1 latent ones


def tokenizer(corpus: Sequence[str], length: int) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words of `corpus` in lower case, and printable ASCII for any other text."""
    words = sorted({f"▁{word}" for text in corpus for word in re.findall(r"[\w-]+", text.lower()) if len(word) > 1})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(c), -3.0) for c in range(33, 127)]
    return T5Tokenizer(
        vocab=[*special, *letters, *((word, -2.0) for word in words)], extra_ids=0, model_max_length=length
    )


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """A tokenizer that `save_pretrained` wrote."""
    return T5Tokenizer.from_pretrained(folder)


def text_encoder(words: T5Tokenizer, width: int, layers: int, heads: int) -> T5EncoderModel:
    """A T5 encoder for these tokens, random weights."""
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config)


def autoencoder(channels: Sequence[int], latent: int, size: int, groups: int = 8) -> AutoencoderKLCogVideoX:
    """A causal convolutional KL autoencoder that halves height and width len(channels) - 1 times, and time twice; random weights."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(channels), up_block_types=("CogVideoXUpBlock3D",) * len(channels), block_out_channels=tuple(channels),
        latent_channels=latent, layers_per_block=1, norm_num_groups=groups, temporal_compression_ratio=COMPRESSION, sample_height=size, sample_width=size,
    )  # fmt: skip


def load_autoencoder(folder: Path) -> AutoencoderKLCogVideoX:
    """An autoencoder that `save_pretrained` wrote, in eval mode."""
    network: AutoencoderKLCogVideoX = load_network(AutoencoderKLCogVideoX, folder)
    return network


def transformer(
    width: int,
    heads: int,
    layers: int,
    latent: int,
    size: int,
    frames: int,
    text_width: int,
    length: int,
    rotary: bool = False,
) -> CogVideoXTransformer3DModel:
    """A denoiser of videos of `frames` frames, whose latents are `size` x `size`, in patches of 2 x 2; random weights."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=latent, out_channels=latent, time_embed_dim=width, text_embed_dim=text_width,
        num_layers=layers, sample_width=size, sample_height=size, sample_frames=frames, patch_size=2, temporal_compression_ratio=COMPRESSION,
        max_text_seq_length=length, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip


def scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2B's: zero terminal SNR, v-prediction, trailing times, all shifted towards noise."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction", snr_shift_scale=3.0,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def pipeline(words: T5Tokenizer, text: nn.Module, vae: nn.Module, net: nn.Module) -> CogVideoXPipeline:
    """The parts as an ordinary `CogVideoXPipeline`, in eval mode."""
    return CogVideoXPipeline(words, text.eval(), vae.eval(), net.eval(), scheduler())
