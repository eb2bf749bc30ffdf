"""A Stable Diffusion pipeline in miniature: the same classes, a few million parameters, its own vocabulary.

Built from plain numbers, so that the bundled teacher is the very thing that `StableDiffusionPipeline.from_pretrained`
loads, and so that tests can have one with random weights in milliseconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(corpus: Sequence[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges are learned on `corpus`; any other text still falls back to bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in _model_merges(bpe)]
    pieces = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=END)


def _model_merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModel:
    """A causal CLIP text transformer for `tokenizer`, random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def autoencoder(channels: Sequence[int], latent: int, size: int, groups: int = 8) -> AutoencoderKL:
    """A convolutional KL autoencoder that halves the resolution len(channels) - 1 times, random weights."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latent, block_out_channels=tuple(channels), layers_per_block=1, norm_num_groups=groups, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels), mid_block_add_attention=False,
    )  # fmt: skip


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """An autoencoder that `save_pretrained` wrote, in eval mode."""
    return AutoencoderKL.from_pretrained(folder).eval()


def unet(
    channels: Sequence[int], attention: Sequence[bool], latent: int, size: int, text_width: int, groups: int = 16
) -> UNet2DConditionModel:
    """A conditional U-Net: cross attention where `attention` says so, and the pooled text added to the time embedding."""
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    return UNet2DConditionModel(
        sample_size=size, in_channels=latent, out_channels=latent, block_out_channels=tuple(channels), layers_per_block=1,
        down_block_types=down, up_block_types=up, cross_attention_dim=text_width, attention_head_dim=4, norm_num_groups=groups,
        addition_embed_type="text", addition_embed_type_num_heads=8, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Cosine schedule with zero terminal SNR, v-prediction, trailing times."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=1,
    )  # fmt: skip


def pipeline(vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, net: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The four parts as an ordinary `StableDiffusionPipeline`, in eval mode."""
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=net.eval(), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
