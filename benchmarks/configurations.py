"""Folders of configurations without weights, at the true sizes of the models that the recipes name.

    python benchmarks/configurations.py FOLDER               # FOLDER/sd15, sdxl, ...: for `fewstep plan --teacher`
    python benchmarks/configurations.py FOLDER sd15 flux     # these alone

Networks, schedulers and lengths of prompts are those of the published models; tokenizers know a few words. Comments
mark what is not known for sure; none of it changes a size in memory.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from fewstep.atomic import write_json
from fewstep.backbones.miniature import word_tokenizer
from fewstep.backbones.miniature_video import tokenizer as letter_tokenizer

Part = tuple[str, str, Mapping[str, Any]]  # library, class, configuration
FOUR = 4  # levels of the autoencoders
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def autoencoder(size: int, scale: float, **settings: Any) -> Part:
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
            **settings,
        },
    )


def sixteen(scale: float, shift: float) -> Part:
    """Return an autoencoder of 16 channels."""
    quantless = {"use_quant_conv": False, "use_post_quant_conv": False}
    return autoencoder(1024, scale, latent_channels=16, shift_factor=shift, **quantless)


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
UMT5 = (
    "transformers",
    "UMT5EncoderModel",
    {
        **T5[2],
        "model_type": "umt5",
        "vocab_size": 256384,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
)
CLIP_TOKENIZER: Part = ("transformers", "CLIPTokenizer", {"length": 77})
QWEN_TOKENIZER: Part = (
    "transformers",
    "Qwen2Tokenizer",
    {
        "length": 4096,
        "template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    },
)
MISTRAL_TOKENIZER: Part = (
    "transformers",
    "Qwen2Tokenizer",
    {
        "length": 4096,
        "template": "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}\n{% endfor %}",
    },
)


def t5_tokenizer(length: int) -> Part:
    return "transformers", "T5Tokenizer", {"length": length}


def language_model(
    width: int, hidden: int, layers: int, heads: int, kv: int, vocab: int, **settings: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        **settings,
    }


def qwen3(kind: str, width: int, hidden: int) -> Part:
    own = language_model(width, hidden, 36, 32, 8, 151936)
    return "transformers", kind, {"model_type": "qwen3", **own, "tie_word_embeddings": (width, hidden) == QWEN_4B}


QWEN_4B, QWEN_8B = (2560, 9728), (4096, 12288)
SEEN = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN_25_VL = (
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **language_model(3584, 18944, 28, 28, 4, 152064),
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        "tie_word_embeddings": False,
        **SEEN,
    },
)


def qwen3_vl(kind: str, size: tuple[int, int], width: int, hidden: int, depth: int, deepstack: list[int]) -> Part:
    """Return a Qwen 3 VL; `width` and those after it are of its eyes."""
    return (
        "transformers",
        kind,
        {
            "model_type": "qwen3_vl",
            "text_config": {
                "model_type": "qwen3_vl_text",
                **language_model(*size, 36, 32, 8, 151936),
                "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": depth,
                "hidden_size": width,
                "intermediate_size": hidden,
                "num_heads": 16,
                "out_hidden_size": size[0],
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": deepstack,
            },
            "tie_word_embeddings": size == QWEN_4B,
            **SEEN,
        },
    )


MISTRAL = (
    "transformers",
    "Mistral3ForConditionalGeneration",
    {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", **language_model(5120, 32768, 40, 32, 8, 131072)},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
        "image_token_index": 10,
        "tie_word_embeddings": False,
    },
)


def scheduler(kind: str, **settings: Any) -> Part:
    return "diffusers", kind, {**NOISE, **settings}


def flow(**settings: Any) -> Part:
    return "diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, **settings}


def shifting(**settings: Any) -> Part:
    """Return a scheduler whose shift depends on the size."""
    return flow(**{"use_dynamic_shifting": True, "max_shift": 1.15, **settings})


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
    "tokenizer": t5_tokenizer(120),
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
    "tokenizer": t5_tokenizer(226),
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


def sd35(layers: int, places: int, dual: int) -> Mapping[str, Part]:
    """Return Stable Diffusion 3.5; `dual` blocks attend to the image twice."""
    return {
        "text_encoder": clip(768, 12, 12, True),
        "text_encoder_2": clip(1280, 32, 20, True, "gelu"),
        "text_encoder_3": T5,
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "tokenizer_3": t5_tokenizer(256),
        "transformer": (
            "diffusers",
            "SD3Transformer2DModel",
            {
                "num_layers": layers,
                "num_attention_heads": layers,
                "caption_projection_dim": 64 * layers,
                "pos_embed_max_size": places,
                "dual_attention_layers": list(range(dual)),
                "qk_norm": "rms_norm",
            },
        ),
        "vae": sixteen(1.5305, 0.0609),
        "scheduler": flow(),
    }


FLUX = {
    "text_encoder": clip(768, 12, 12, False),
    "text_encoder_2": T5,
    "tokenizer": CLIP_TOKENIZER,
    "tokenizer_2": t5_tokenizer(512),
    "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "vae": sixteen(0.3611, 0.1159),
    "scheduler": shifting(),
}


def flux2(encoder: Part, tokenizer: Part, **settings: Any) -> Mapping[str, Part]:
    return {
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": ("diffusers", "Flux2Transformer2DModel", settings),
        "vae": ("diffusers", "AutoencoderKLFlux2", {}),
        "scheduler": shifting(),
    }


def klein(size: tuple[int, int], double: int, single: int, heads: int) -> Mapping[str, Part]:
    layers = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    told = {"joint_attention_dim": 3 * size[0], "guidance_embeds": False}
    return flux2(qwen3("Qwen3ForCausalLM", *size), QWEN_TOKENIZER, **layers, **told)


QWENIMAGE = {
    "text_encoder": QWEN_25_VL,
    "tokenizer": QWEN_TOKENIZER,
    "transformer": ("diffusers", "QwenImageTransformer2DModel", {}),
    "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
    "scheduler": shifting(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
}
QWENIMAGE21 = {  # networks as their classes are by default, which are the published sizes: 7.1, 8.8 and 0.34 B
    "text_encoder": qwen3_vl("Qwen3VLForConditionalGeneration", QWEN_8B, 1152, 4304, 27, [8, 16, 24]),
    "processor": (
        "transformers",
        "Qwen3VLProcessor",
        {
            "length": 4096,
            "template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n"
            "{% endfor %}",
        },
    ),
    "transformer": ("diffusers", "QwenImage21Transformer2DModel", {}),
    "vae": ("diffusers", "AutoencoderKLQwenImage21", {}),
    "scheduler": shifting(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
}
ZIMAGE = {
    "text_encoder": qwen3("Qwen3Model", *QWEN_4B),
    "tokenizer": QWEN_TOKENIZER,
    "transformer": ("diffusers", "ZImageTransformer2DModel", {}),
    "vae": sixteen(0.3611, 0.1159),
    "scheduler": flow(shift=6.0),  # of the base model, not known for sure; the turbo model's is 3
}
KREA2 = {
    "text_encoder": qwen3_vl("Qwen3VLModel", QWEN_4B, 1024, 4096, 24, [5, 11, 17]),
    "tokenizer": QWEN_TOKENIZER,
    "transformer": ("diffusers", "Krea2Transformer2DModel", {}),
    "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
    "scheduler": shifting(max_image_seq_len=6400),
}


def wan(heads: int, hidden: int, layers: int, networks: int = 1, channels: int = 16, **vae: Any) -> Mapping[str, Part]:
    transformer: Part = (
        "diffusers",
        "WanTransformer3DModel",
        {
            "num_attention_heads": heads,
            "ffn_dim": hidden,
            "num_layers": layers,
            "in_channels": channels,
            "out_channels": channels,
        },
    )
    return {
        "text_encoder": UMT5,
        "tokenizer": t5_tokenizer(512),
        "transformer": transformer,
        **({"transformer_2": transformer} if networks > 1 else {}),
        "vae": ("diffusers", "AutoencoderKLWan", vae),
        "scheduler": (
            "diffusers",
            "UniPCMultistepScheduler",
            # 3 is for 480p, 5 for 720p and for 2.2-5B: which of them the hub has is not known for sure
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
    }


WIDE: dict[str, Any] = {  # Wan 2.2-5B's autoencoder; the statistics of its latents are not known here
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
ABSENT = [None, None]  # a part that the pipeline may lack
UNDISTILLED = {"is_distilled": False}
ONE = {"transformer_2": ABSENT, "boundary_ratio": None, "expand_timesteps": False}
PIPELINES: dict[str, tuple[str, Mapping[str, Part], Mapping[str, Any]]] = {
    "sd15": ("StableDiffusionPipeline", SD15, {"feature_extractor": ABSENT, "safety_checker": ABSENT}),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, {"force_zeros_for_empty_prompt": True}),
    "pixart": ("PixArtAlphaPipeline", PIXART, {}),
    "cogvideox": ("CogVideoXPipeline", COGVIDEOX, {}),
    "sd35m": ("StableDiffusion3Pipeline", sd35(24, 384, 13), {}),
    "sd35l": ("StableDiffusion3Pipeline", sd35(38, 192, 0), {}),
    "flux": ("FluxPipeline", FLUX, {}),
    "flux2-klein-4b": ("Flux2KleinPipeline", klein(QWEN_4B, 5, 20, 24), UNDISTILLED),
    "flux2-klein-9b": ("Flux2KleinPipeline", klein(QWEN_8B, 8, 24, 32), UNDISTILLED),
    "flux2-dev": ("Flux2Pipeline", flux2(MISTRAL, MISTRAL_TOKENIZER), {}),
    "qwenimage": ("QwenImagePipeline", QWENIMAGE, {}),
    "qwenimage21": ("QwenImage21Pipeline", QWENIMAGE21, {"sample_sigmas": None}),
    "zimage": ("ZImagePipeline", ZIMAGE, {}),
    "krea2": (
        "Krea2Pipeline",
        KREA2,
        {**UNDISTILLED, "patch_size": 2, "text_encoder_select_layers": list(range(2, 36, 3))},
    ),
    "wan21": ("WanPipeline", wan(12, 8960, 30), ONE),
    "wan21-14b": ("WanPipeline", wan(40, 13824, 40), ONE),
    "wan22-5b": ("WanPipeline", wan(24, 14336, 30, channels=48, **WIDE), {**ONE, "expand_timesteps": True}),
    "wan22-a14b": (
        "WanPipeline",
        wan(40, 13824, 40, networks=2),
        {"boundary_ratio": 0.875, "expand_timesteps": False},
    ),
}
WORDS = ("a photo of a red fox",)


def qwen_tokenizer(length: int, template: str) -> Any:
    """Return printable bytes, a few words, and the marks of Qwen's conversations."""
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"]
    known = word_tokenizer(WORDS, 600, length).get_vocab()
    pieces = sorted(p for p in known if not p.endswith("</w>") and not p.startswith("<|"))
    vocab = {p: i for i, p in enumerate([*pieces, *marks])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length, pad_token=marks[2], eos_token=marks[1])
    made.chat_template = template
    return made


TOKENIZERS: dict[str, Callable[..., Any]] = {
    "CLIPTokenizer": lambda length: word_tokenizer(WORDS, 600, length),
    "T5Tokenizer": lambda length: letter_tokenizer((), length),
    "Qwen2Tokenizer": qwen_tokenizer,
    "Qwen3VLProcessor": qwen_tokenizer,
}


def write(name: str, folder: Path) -> Path:
    """Write a model's configurations, and return their folder."""
    kind, parts, settings = PIPELINES[name]
    place = folder / name
    index = {"_class_name": kind, **settings, **{n: [library, called] for n, (library, called, _) in parts.items()}}
    write_json(place / "model_index.json", index)
    for part, (_, called, config) in parts.items():
        if called in TOKENIZERS:
            TOKENIZERS[called](**config).save_pretrained(place / part)
        else:
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            write_json(place / part / file, {"_class_name": called, **config})
    return place


if __name__ == "__main__":
    for name in sys.argv[2:] or PIPELINES:
        print(write(name, Path(sys.argv[1])))
