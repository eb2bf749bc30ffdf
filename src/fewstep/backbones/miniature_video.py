"""A CogVideoX pipeline in miniature.

The same classes, a few million parameters, one token a word. The networks are built from plain numbers, so
`CogVideoXPipeline.from_pretrained` loads a tiny video teacher as any other, and tests make one with random
weights in milliseconds.
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
    """Return a T5 tokenizer with one token for each word of `corpus`.

    Words are in lower case. Any other text falls back to printable ASCII characters.
    """
    words = sorted({f"▁{word}" for text in corpus for word in re.findall(r"[\w-]+", text.lower()) if len(word) > 1})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(c), -3.0) for c in range(33, 127)]
    return T5Tokenizer(
        vocab=[*special, *letters, *((word, -2.0) for word in words)], extra_ids=0, model_max_length=length
    )


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """Load a tokenizer that `save_pretrained` wrote."""
    return T5Tokenizer.from_pretrained(folder)


def text_encoder(words: T5Tokenizer, width: int, layers: int, heads: int) -> T5EncoderModel:
    """Return a T5 encoder for these tokens, with random weights."""
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config)


def autoencoder(channels: Sequence[int], latent: int, size: int, groups: int = 8) -> AutoencoderKLCogVideoX:
    """Return a causal convolutional KL autoencoder with random weights.

    The encoder halves height and width len(channels) - 1 times, and time twice.
    """
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(channels), block_out_channels=tuple(channels),
        latent_channels=latent, layers_per_block=1, norm_num_groups=groups, temporal_compression_ratio=COMPRESSION,
        sample_height=size, sample_width=size,
    )  # fmt: skip


def load_autoencoder(folder: Path) -> AutoencoderKLCogVideoX:
    """Load an autoencoder that `save_pretrained` wrote, in eval mode."""
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
    """Return a denoiser of videos with random weights.

    Videos have `frames` frames. Their latents are `size` x `size`, in patches of 2 x 2.
    """
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=latent, out_channels=latent,
        time_embed_dim=width, text_embed_dim=text_width, num_layers=layers, sample_width=size, sample_height=size,
        sample_frames=frames, patch_size=2, temporal_compression_ratio=COMPRESSION,
        max_text_seq_length=length, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip


def scheduler() -> CogVideoXDDIMScheduler:
    """Return CogVideoX-2B's scheduler.

    Zero terminal SNR, v-prediction, trailing times, all shifted towards noise.
    """
    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


def pipeline(words: T5Tokenizer, text: nn.Module, vae: nn.Module, net: nn.Module) -> CogVideoXPipeline:
    """Return the parts as a `CogVideoXPipeline` in eval mode."""
    return CogVideoXPipeline(words, text.eval(), vae.eval(), net.eval(), scheduler())
