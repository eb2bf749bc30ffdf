"""Folders of configurations without weights, at the true sizes of the models that the recipes name.

    python benchmarks/configurations.py FOLDER    # FOLDER/sd15, sdxl, pixart, cogvideox: for `fewstep plan --teacher`

Networks, schedulers and lengths of prompts are those of the published models; tokenizers know a few words.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.atomic import write_json
from fewstep.backbones.miniature import word_tokenizer
from fewstep.backbones.miniature_video import tokenizer as letter_tokenizer

Part = tuple[str, str, Mapping[str, Any]]  # library, class, configuration
FOUR = 4  # levels of the autoencoders
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def autoencoder(size: int, scale: float) -> Part:
    return (
        "diffusers",
        "AutoencoderKL",
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * FOUR,
            "up_block_types": ["UpDecoderBlock2D"] * FOUR,
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": size,
            "scaling_factor": scale,
        },
    )


def clip(width: int, layers: int, heads: int, projected: bool, act: str = "quick_gelu") -> Part:
    return (
        "transformers",
        "CLIPTextModelWithProjection" if projected else "CLIPTextModel",
        {
            "model_type": "clip_text_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 77,
            "projection_dim": width,
            "hidden_act": act,
            "vocab_size": 49408,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
    )


T5 = (
    "transformers",
    "T5EncoderModel",
    {
        "model_type": "t5",
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    },
)
CLIP_TOKENIZER: Part = ("transformers", "CLIPTokenizer", {})
T5_TOKENIZER: Part = ("transformers", "T5Tokenizer", {})


def scheduler(kind: str, **settings: Any) -> Part:
    return "diffusers", kind, {**NOISE, **settings}


def unet(**settings: Any) -> Part:
    return "diffusers", "UNet2DConditionModel", {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **settings}


SD15 = {
    "text_encoder": clip(768, 12, 12, False),
    "tokenizer": CLIP_TOKENIZER,
    "unet": unet(sample_size=64, cross_attention_dim=768),
    "vae": autoencoder(512, 0.18215),
    "scheduler": scheduler("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False),
}
SDXL = {
    "text_encoder": clip(768, 12, 12, False),
    "text_encoder_2": clip(1280, 32, 20, True, "gelu"),
    "tokenizer": CLIP_TOKENIZER,
    "tokenizer_2": CLIP_TOKENIZER,
    "unet": unet(
        sample_size=128,
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "vae": autoencoder(1024, 0.13025),
    "scheduler": scheduler("EulerDiscreteScheduler", steps_offset=1, timestep_spacing="leading"),
}
PIXART = {
    "text_encoder": T5,
    "tokenizer": T5_TOKENIZER,
    "transformer": (
        "diffusers",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "sample_size": 128,
            "patch_size": 2,
            "norm_num_groups": 32,
            "use_additional_conditions": True,
        },
    ),
    "vae": autoencoder(512, 0.18215),
    "scheduler": scheduler("DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
}
COGVIDEOX = {
    "text_encoder": T5,
    "tokenizer": T5_TOKENIZER,
    "transformer": (
        "diffusers",
        "CogVideoXTransformer3DModel",
        {"use_rotary_positional_embeddings": False},
    ),
    "vae": ("diffusers", "AutoencoderKLCogVideoX", {"scaling_factor": 1.15258426}),
    "scheduler": scheduler(
        "CogVideoXDDIMScheduler",
        clip_sample=False,
        prediction_type="v_prediction",
        snr_shift_scale=3.0,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
}
ABSENT = [None, None]  # a part that the pipeline may lack
PIPELINES: dict[str, tuple[str, Mapping[str, Part], Mapping[str, Any], int]] = {
    "sd15": ("StableDiffusionPipeline", SD15, {"feature_extractor": ABSENT, "safety_checker": ABSENT}, 77),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, {"force_zeros_for_empty_prompt": True}, 77),
    "pixart": ("PixArtAlphaPipeline", PIXART, {}, 120),
    "cogvideox": ("CogVideoXPipeline", COGVIDEOX, {}, 226),
}
TOKENIZERS: dict[str, Callable[[int], Any]] = {
    "CLIPTokenizer": lambda length: word_tokenizer(("a photo of a red fox",), 600, length),
    "T5Tokenizer": lambda length: letter_tokenizer((), length),
}


def write(name: str, folder: Path) -> Path:
    """Write a model's configurations, and return their folder."""
    kind, parts, settings, length = PIPELINES[name]
    place = folder / name
    index = {"_class_name": kind, **settings, **{n: [library, called] for n, (library, called, _) in parts.items()}}
    write_json(place / "model_index.json", index)
    for part, (_, called, config) in parts.items():
        if called in TOKENIZERS:
            TOKENIZERS[called](length).save_pretrained(place / part)
        else:
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            write_json(place / part / file, {"_class_name": called, **config})
    return place


if __name__ == "__main__":
    for name in PIPELINES:
        print(write(name, Path(sys.argv[1])))
