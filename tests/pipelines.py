"""The smallest pipelines of every family that fewstep distils.

They are real diffusers classes with random weights, and they need no file and no network.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    CogVideoXPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from fewstep.backbones import miniature, miniature_video
from fewstep.backbones.autoencoders import over_white
from fewstep.backbones.base import Backbone
from fewstep.backbones.families import family_of_pipeline
from fewstep.backbones.load import around, at_size, load_teacher
from fewstep.backbones.parts import frozen
from fewstep.backbones.qwenimage21 import Qwen3VLProcessor
from fewstep.backbones.unconditional import pixel_pipeline, pixel_unet

from . import tiny

LENGTH = 16  # tokens of a CLIP prompt


def sd() -> DiffusionPipeline:
    return tiny.pipeline()


def sdxl() -> StableDiffusionXLPipeline:
    """32x32 images from 16x16 latents."""
    first, second = clip_tokenizer(), clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=64,
        attention_head_dim=(4, 8),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(0.13025),
        text_encoder=clip(first, width=24),
        text_encoder_2=clip(second, projected=True, width=40),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def pixart(sizes: bool = False) -> PixArtAlphaPipeline:
    """16x16 images; with `sizes` as the 1024 model, which is told the resolution, at 256x256."""
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=128 if sizes else 8,
        patch_size=2,
        norm_num_groups=8,
        use_additional_conditions=sizes,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(tokenizer, t5(tokenizer), autoencoder(0.18215), transformer, scheduler)


def pixart_sigma() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(**pixart().components)


def cogvideox(rotary: bool = False) -> CogVideoXPipeline:
    """Nine frames of 16x16 from three frames of 2x2 latents."""
    tokenizer = t5_tokenizer()
    vae = miniature_video.autoencoder((8, 8, 8, 8), 4, 16, groups=2)
    transformer = miniature_video.transformer(64, 4, 2, 4, 2, 9, 32, LENGTH, rotary)
    return miniature_video.pipeline(tokenizer, t5(tokenizer), vae, transformer)


def wan(kind: Literal["2.1", "2.2-5B", "2.2-A14B"] = "2.1") -> WanPipeline:
    """Five frames of 32x32 from two frames of 4x4 latents, and twice as wide for 2.2-5B."""
    tokenizer = t5_tokenizer()
    own = kind == "2.2-5B"
    patched = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 2.0, 1.1],
        **(patched if own else {}),
    )
    networks = [
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=2,  # as many patches along each side at most: pipelines draw no larger videos
        )
        for _ in range(2 if kind == "2.2-A14B" else 1)
    ]
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer,
        UMT5EncoderModel(config).eval(),
        vae.eval(),
        scheduler,
        *networks,
        boundary_ratio=0.8 if len(networks) > 1 else None,
        expand_timesteps=own,
    )


def sd3() -> StableDiffusion3Pipeline:
    """16x16 images from 8x8 latents."""
    first, second, third = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, shift=0.06),
        text_encoder=clip(first, projected=True),
        tokenizer=first,
        text_encoder_2=clip(second, projected=True),
        tokenizer_2=second,
        text_encoder_3=t5(third, 64),
        tokenizer_3=third,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Printable bytes, a few words, and the marks of Qwen's conversations."""
    words = miniature.word_tokenizer(tiny.WORDS, 600, LENGTH)
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    pieces = [p for p in words.get_vocab() if not p.endswith("</w>") and not p.startswith("<|")]
    vocab = {p: i for i, p in enumerate([*sorted(pieces), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=4096, pad_token=marks[2], eos_token=marks[1])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen3(tokenizer: Qwen2Tokenizer, layers: int, width: int = 16) -> dict[str, Any]:
    """Settings of a Qwen 3 of this width."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }  # fmt: skip


def flux2() -> Flux2KleinPipeline:
    """Images of 4 pixels a token; at size 16, 4x4 tokens."""
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    lively(transformer)
    return Flux2KleinPipeline(
        dynamic_scheduler(),
        flux2_autoencoder(),
        Qwen3ForCausalLM(Qwen3Config(**qwen3(tokenizer, 27))).eval(),
        tokenizer,
        transformer,
    )


def flux2_dev() -> Flux2Pipeline:
    """The same with an embedded guidance scale and another text encoder."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}\n{% endfor %}"
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
    )
    lively(transformer)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 30,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text},
        vision_config={"model_type": "pixtral", **vision},
        image_token_index=3,
    )
    encoder = Mistral3ForConditionalGeneration(config).eval()
    return Flux2Pipeline(dynamic_scheduler(), flux2_autoencoder(), encoder, tokenizer, transformer)


def flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    ).eval()
    torch.nn.init.uniform_(vae.bn.running_mean, -0.5, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def lively(network: nn.Module) -> nn.Module:
    """Double the weights of linear layers: the prompt then shows in the images."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(2)
    return network


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.5, 0.5, 2.0, 0.7],
    ).eval()


def qwenimage() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6, vision_token_id=7,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    lively(transformer)
    scheduler = dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    encoder = Qwen2_5_VLForConditionalGeneration(text).eval()
    return QwenImagePipeline(scheduler, qwen_autoencoder(), encoder, tokenizer, transformer)


def qwenimage21() -> QwenImage21Pipeline:
    """Images of 16 pixels a token, with an alpha channel; at size 32, 2x2 tokens."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|image_pad|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        context_in_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    lively(transformer)
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.5, 0.5, 2.0, 0.7],
    )
    scheduler = dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    encoder = Qwen3VLForConditionalGeneration(qwen3_vl(tokenizer)).eval()
    return QwenImage21Pipeline(scheduler, vae.eval(), encoder, Qwen3VLProcessor(tokenizer), transformer)


def zimage() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 64, 64],
    )
    lively(transformer)
    # What the library leaves uninitialised.
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name))
    encoder = Qwen3Model(Qwen3Config(**qwen3(tokenizer, 2))).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return ZImagePipeline(scheduler, autoencoder(0.3611, shift=0.1159), encoder, tokenizer, transformer)


def flux() -> FluxPipeline:
    first, second = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    lively(transformer)
    return FluxPipeline(
        dynamic_scheduler(), autoencoder(0.3611, shift=0.1159), clip(first), first, t5(second), second, transformer
    )


def qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=qwen3(tokenizer, 3) | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip


def krea2() -> Krea2Pipeline:
    tokenizer = qwen_tokenizer()
    text = qwen3_vl(tokenizer)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    lively(transformer)
    # Zero when the library makes them: the network would look at no time.
    for name, weight in transformer.named_parameters():
        if "scale_shift_table" in name or "norm" in name:
            torch.nn.init.normal_(weight, std=0.1)
    scheduler = dynamic_scheduler(max_image_seq_len=6400)
    encoder = Qwen3VLModel(text).eval()
    return Krea2Pipeline(
        scheduler, qwen_autoencoder(), encoder, tokenizer, transformer, text_encoder_select_layers=(1, 3)
    )


def dynamic_scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd,
    "sdxl": sdxl,
    "pixart": pixart,
    "pixart-sigma": pixart_sigma,
    "cogvideox": cogvideox,
    "cogvideox-rotary": lambda: cogvideox(rotary=True),
    "sd3": sd3,
    "flux2": flux2,
    "flux2-dev": flux2_dev,
    "qwenimage": qwenimage,
    "qwenimage21": qwenimage21,
    "zimage": zimage,
    "flux": flux,
    "krea2": krea2,
    "wan": wan,
}
# Families whose pipelines make images of 1024 pixels by default, with the size that tests take.
# Families whose tests take long, one of each kind aside: for tests of shapes and images, and for those that train.
LONG = ("flux2-dev", "krea2", "qwenimage21")
LONG_TRAINED = (*LONG, "sdxl", "sd3", "flux", "flux2", "qwenimage", "zimage")
SIZES = dict.fromkeys(["flux2", "flux2-dev", "qwenimage", "zimage", "flux", "krea2"], 16) | {"qwenimage21": 32}


# Models of a family that are not tested by all that runs over the families.
VARIANTS: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan-5b": lambda: wan("2.2-5B"),
    "wan-a14b": lambda: wan("2.2-A14B"),
}
PIXELS: dict[str, Callable[[], DiffusionPipeline]] = {  # take no prompts
    "ddpm": lambda: tiny.pixels(labels=()).pipe,
    "consistency": lambda: pixel_pipeline(pixel_unet([8, 16], [False, True], 3, 8, 0), EDMEulerScheduler()),
}


def load(folder: Path, size: int | None = None) -> Backbone:
    """The teacher that `save` wrote, at the size that tests take."""
    return load_teacher(folder, size=size or SIZES.get(folder.name))


def backbone(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A family's tiny pipeline as a backbone, at the size that tests take."""
    return at_size(around(frozen(FAMILIES[family](), dtype), "tiny"), SIZES.get(family))


def cases(long: Sequence[str] = LONG) -> list[Any]:
    """All families as parameters of a test, those that take `long` behind a mark."""
    return [pytest.param(f, marks=pytest.mark.slow) if f in long else f for f in FAMILIES]


def options(family: str, scale: float, count: int) -> dict[str, Any]:
    """What a family's pipeline is told of a guidance scale, for so many prompts."""
    found = family_of_pipeline(FAMILIES[family]()).guidance(scale, count)
    return {k: v for k, v in found.items() if v is not None}


def called(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Tensor:
    """What a pipeline draws without guidance, over white: prompts one at a time where a batch is drawn otherwise."""
    family = family_of_pipeline(pipe)
    if family.alone and len(prompts) > 1:
        return torch.cat([called(pipe, [p], [s], **options) for p, s in zip(prompts, seeds, strict=True)])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = pipe(prompt=list(prompts), generator=generators, output_type="pt", **options)
    return found.frames if family.video else over_white(found.images)


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A family's tiny pipeline as a folder; its weights depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (FAMILIES | VARIANTS)[family]().save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    return miniature.word_tokenizer(tiny.WORDS, 600, LENGTH)


def clip(tokenizer: CLIPTokenizer, projected: bool = False, width: int = 32) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=32, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Printable ASCII, a letter a token."""
    return miniature_video.tokenizer((), LENGTH)


def t5(tokenizer: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    return miniature_video.text_encoder(tokenizer, width, 2, 4).eval()


def autoencoder(scale: float, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()


def spoil(folder: Path) -> None:
    """Replace every weight of a folder by NaN.

    Its files keep their headers, and whoever reads more of them is refused.
    """
    for file in folder.rglob("*.safetensors"):
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:header] + b"\xff" * (len(data) - header))
