"""Checks of the settings of a pipeline's parts.

fewstep follows a setting or refuses it when the teacher is loaded, and never passes over one. Most settings
say how a network computes, and the network reads them. The checks are for the settings that code around the
network has to read, and for those that say whether the parts go together.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    CogVideoXPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    WanPipeline,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.schedule import VP, Flow
from ..reading import json_in, reason
from .schedulers import plain_config, table_of
from .switches import require_switches
from .weights import UnfitError, inside

LARGEST = 4096  # largest height and width of states
LAYERS = re.compile(r"^(num_.*layers|layers_per_block|num_.*blocks|num_layers)$")
MOST = 1000  # largest number of layers, which libraries build one by one
TABLE = 100_000  # largest number of times in a table of noise levels
IMAGES = (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
SIZES = "pass the folder that save_pretrained wrote"


def read_settings(folder: Path, parts: Iterable[str]) -> None:
    """Read the JSON settings of a pipeline's parts before libraries do.

    Raises UnfitError for settings that cannot be built.
    """
    for part in parts:
        for file in sorted((folder / part).glob("*config.json")):
            inside(file, folder)
            try:
                value = json_in(file)
            except Exception as error:  # each kind of damage raises another type
                raise UnfitError(f"{part}/{file.name} is damaged ({reason(error)})") from error
            if not isinstance(value, dict):
                raise UnfitError(f"{part}/{file.name} is damaged (it holds a {type(value).__name__}, not an object)")
            if "quantization_config" in value:
                raise UnfitError(
                    f"{part}/{file.name} asks for weights in fewer bits (quantization_config), "
                    "which fewstep does not read",
                    "pass the model in float16, bfloat16 or float32; roles.quantize rounds it",
                )
            for key, number in _numbers(value):
                if LAYERS.match(key) and not 0 <= number <= MOST:
                    raise UnfitError(f"{part}/{file.name} says {key} {number:g}, allowed are 0 to {MOST}")
                if key == "num_train_timesteps" and not 1 < number <= TABLE:
                    raise UnfitError(f"{part}/{file.name} says {key} {number:g}, allowed are 2 to {TABLE}")
                if (
                    math.isnan(number) or (math.isfinite(number) and abs(number) >= 2**31)
                ) and key != "model_max_length":
                    raise UnfitError(f"{part}/{file.name} says {key} {number:g}, which is no setting of a network")


def _numbers(value: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for key, entry in value.items():
        for number in entry if isinstance(entry, list) else [entry]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key, number


def require_settings(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline if fewstep follows all its settings.

    Raises UnfitError otherwise.
    """
    require_switches(pipe)
    if isinstance(pipe, IMAGES):
        _autoencoder(pipe)
    if isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        _unet(pipe)
    elif isinstance(pipe, PixArtAlphaPipeline | PixArtSigmaPipeline):
        _pixart(pipe)
    elif isinstance(pipe, StableDiffusion3Pipeline):
        _sd3(pipe)
    elif isinstance(pipe, CogVideoXPipeline):
        _cogvideox(pipe)
    elif isinstance(pipe, WanPipeline):
        _wan(pipe)
    _tokenizers(pipe)
    return pipe


def whole(where: str, key: str, value: object, least: int = 1, most: int = LARGEST) -> int:
    """Return `value` if it is a whole number in the range.

    `where` and `key` name the setting. Raises UnfitError otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UnfitError(f"{where} says {key} {_shown(value)}, allowed are whole numbers from {least} to {most}", SIZES)
    return value


def number(where: str, key: str, value: object, positive: bool = True) -> float:
    """Return `value` if it is a finite number.

    With `positive`, above 0. `where` and `key` name the setting. Raises UnfitError otherwise.
    """
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or (positive and value <= 0)
    ):
        raise UnfitError(
            f"{where} says {key} {_shown(value)}, allowed are {'positive' if positive else 'finite'} numbers", SIZES
        )
    return float(value)


def same(where: str, key: str, value: object, wanted: object, why: str, cure: str = SIZES) -> None:
    """Check that a setting is what the rest of the pipeline needs.

    Raises UnfitError otherwise.
    """
    if value != wanted:
        raise UnfitError(f"{where} says {key} {_shown(value)}, {why}", cure)


def _shown(value: object) -> str:
    text = json.dumps(list(value) if isinstance(value, tuple) else value, default=repr)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def side(where: str, value: object, size: int = 0) -> int:
    """Return the height and width of square latents.

    `value` is `sample_size`: a number, or twice the same one. A `size` other than 0 replaces `value`. Raises
    UnfitError.
    """
    if size:
        return size
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2 or pair[0] != pair[1]:
        raise UnfitError(
            f"{where} says sample_size {_shown(value)}, fewstep samples squares",
            "pass size=PIXELS, or set it in its config.json",
        )
    if pair[0] is None:
        raise UnfitError(f"{where} says no sample_size", "pass size=PIXELS, or set it in its config.json")
    return whole(where, "sample_size", pair[0])


def table(pipe: DiffusionPipeline) -> VP:
    """Return the process of a scheduler with a table of betas.

    Raises UnfitError for another scheduler, and for a table that is no noise schedule.
    """
    scheduler = pipe.scheduler
    if "beta_schedule" not in scheduler.config or not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise UnfitError(
            f"its {type(scheduler).__name__} has no table of betas, which a {type(pipe).__name__} is read by",
            "wrap your own network in fewstep.Denoiser",
        )
    return table_of(scheduler)


def flow(pipe: DiffusionPipeline) -> Flow:
    """Return the process of a scheduler of flow matching.

    Raises UnfitError for another scheduler, and for settings that fewstep does not read.
    """
    scheduler = plain_config(pipe.scheduler.config)
    if "shift" not in scheduler or "beta_schedule" in scheduler:
        raise UnfitError(
            f"its {type(pipe.scheduler).__name__} is no scheduler of flow matching",
            "pass a pipeline with FlowMatchEulerDiscreteScheduler",
        )
    for key in ("use_dynamic_shifting", "invert_sigmas"):
        if scheduler.get(key):
            raise UnfitError(
                f"scheduler says {key}, which fewstep does not read",
                "set it to false in scheduler_config.json where the model was made for a fixed shift",
            )
    return Flow(shift=number("scheduler", "shift", scheduler["shift"]))


def require_prediction(pipe: DiffusionPipeline, allowed: Sequence[str]) -> None:
    """Check that a scheduler's prediction type is an allowed one.

    Raises UnfitError otherwise.
    """
    said = pipe.scheduler.config.get("prediction_type", "epsilon")
    if said not in allowed:
        raise UnfitError(
            f"its scheduler says prediction_type {_shown(said)}, allowed are {', '.join(allowed)}",
            "set it in scheduler_config.json",
        )


def _autoencoder(pipe: DiffusionPipeline) -> None:
    """Check the channels and scales of an image autoencoder.

    The scales must be those that the pipeline reads: SD3's shifts latents, SDXL's may normalise them channel
    by channel.
    """
    config, called = pipe.vae.config, type(pipe).__name__
    for key in ("in_channels", "out_channels"):
        same("vae", key, config[key], 3, "images have 3")
    number("vae", "scaling_factor", config.scaling_factor)
    if isinstance(pipe, StableDiffusion3Pipeline):
        number("vae", "shift_factor", config.shift_factor, positive=False)
    elif config.get("shift_factor"):
        raise UnfitError(
            f"vae says shift_factor {_shown(config.shift_factor)}, which a {called} does not read",
            "set it to null in vae/config.json",
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return
    if not isinstance(pipe, StableDiffusionXLPipeline):
        raise UnfitError(
            f"vae says latents_mean and latents_std, which a {called} does not read",
            "set both to null in vae/config.json",
        )
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if not isinstance(values, list | tuple) or len(values) != config.latent_channels:
            raise UnfitError(
                f"vae says {key} {_shown(values)}, allowed are {config.latent_channels} numbers, "
                "one a channel, or null for both",
                SIZES,
            )
        for value in values:
            number("vae", key, value, positive=key == "latents_std")


def _unet(pipe: DiffusionPipeline) -> None:
    config, called = pipe.unet.config, type(pipe).__name__
    latent = pipe.vae.config.latent_channels
    same(
        "unet",
        "in_channels",
        config.in_channels,
        latent,
        f"text-to-image with this autoencoder takes {latent} (more are for inpainting or editing)",
        "pass a text-to-image model",
    )
    same("unet", "out_channels", config.out_channels, latent, f"its latents have {latent}")
    if config.get("time_cond_proj_dim") is not None:
        raise UnfitError(
            "unet says time_cond_proj_dim: it takes guidance as an input, as models that were distilled already do",
            "pass the model that it was distilled from",
        )
    for key in ("class_embed_type", "num_class_embeds"):
        same(
            "unet",
            key,
            config.get(key),
            None,
            f"a {called} has no classes",
            "wrap your own network in fewstep.Denoiser",
        )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise UnfitError(
            f"unet says encoder_hid_dim_type {_shown(config.encoder_hid_dim_type)}: it takes images next to the text",
            "pass a text-to-image model",
        )
    both = isinstance(pipe, StableDiffusionXLPipeline)
    added = ("text_time",) if both else (None, "text")
    if config.get("addition_embed_type") not in added:
        raise UnfitError(
            f"unet says addition_embed_type {_shown(config.addition_embed_type)}, "
            f"a {called} gives it {' or '.join(str(a or 'nothing') for a in added)}",
            SIZES,
        )
    if pipe.config.get("requires_aesthetics_score"):
        raise UnfitError(
            "it asks for aesthetic scores: it is a refiner, which begins with images", "pass the base model"
        )
    width = pipe.text_encoder.config.hidden_size + (pipe.text_encoder_2.config.hidden_size if both else 0)
    _texts(
        "unet",
        "encoder_hid_dim" if config.get("encoder_hid_dim") else "cross_attention_dim",
        config.get("encoder_hid_dim") or config.cross_attention_dim,
        width,
    )
    if both:
        told = pipe.text_encoder_2.config.projection_dim + 6 * whole(
            "unet", "addition_time_embed_dim", config.addition_time_embed_dim
        )
        same(
            "unet",
            "projection_class_embeddings_input_dim",
            config.projection_class_embeddings_input_dim,
            told,
            f"the pooled text and six sizes are {told}",
        )
    table(pipe)
    require_prediction(pipe, ("epsilon", "v_prediction", "sample"))


def _texts(where: str, key: str, value: object, width: int) -> None:
    widths = set(value) if isinstance(value, list | tuple) else {value}
    if widths != {width}:
        raise UnfitError(f"{where} says {key} {_shown(value)}, its text encoders give {width}", SIZES)


def _pixart(pipe: DiffusionPipeline) -> None:
    config, latent = pipe.transformer.config, pipe.vae.config.latent_channels
    same("transformer", "in_channels", config.in_channels, latent, f"its autoencoder's latents have {latent}")
    if config.out_channels not in (latent, 2 * latent):
        raise UnfitError(
            f"transformer says out_channels {_shown(config.out_channels)}, allowed are {latent}, "
            f"or {2 * latent} with a variance",
            SIZES,
        )
    size = side("transformer", config.sample_size)
    if size % whole("transformer", "patch_size", config.patch_size):
        raise UnfitError(
            f"transformer says sample_size {size}, which is no multiple of its patch_size {config.patch_size}", SIZES
        )
    if config.caption_channels is not None:
        _texts("transformer", "caption_channels", config.caption_channels, pipe.text_encoder.config.d_model)
    table(pipe)
    require_prediction(pipe, ("epsilon", "v_prediction", "sample"))


def _sd3(pipe: DiffusionPipeline) -> None:
    config, latent = pipe.transformer.config, pipe.vae.config.latent_channels
    for key in ("in_channels", "out_channels"):
        same("transformer", key, config[key], latent, f"its autoencoder's latents have {latent}")
    size = side("transformer", config.sample_size)
    if size % whole("transformer", "patch_size", config.patch_size):
        raise UnfitError(
            f"transformer says sample_size {size}, which is no multiple of its patch_size {config.patch_size}", SIZES
        )
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name) is None:
            raise UnfitError(f"it has no {name}", "pass the whole pipeline; text_encoder_3 alone may be left out")
    pooled = pipe.text_encoder.config.projection_dim + pipe.text_encoder_2.config.projection_dim
    same(
        "transformer", "pooled_projection_dim", config.pooled_projection_dim, pooled, f"its text encoders give {pooled}"
    )
    if pipe.text_encoder_3 is not None:
        _texts("transformer", "joint_attention_dim", config.joint_attention_dim, pipe.text_encoder_3.config.d_model)
    flow(pipe)


def require_flow(pipe: DiffusionPipeline) -> None:
    """Check that a pipeline's scheduler is one of flow matching.

    Raises UnfitError otherwise.
    """
    config = pipe.scheduler.config
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise UnfitError(
            f"its {type(pipe.scheduler).__name__} is no scheduler of flow matching",
            "pass a pipeline with FlowMatchEulerDiscreteScheduler",
        )
    number("scheduler", "shift", config.shift)
    if config.invert_sigmas:
        raise UnfitError("scheduler says invert_sigmas, which fewstep does not read", "set it to false")
    for key in ("base_shift", "max_shift") if config.use_dynamic_shifting else ():
        number("scheduler", key, config[key], positive=False)
    few, many = (whole("scheduler", k, config[k], most=2**31) for k in ("base_image_seq_len", "max_image_seq_len"))
    if not few < many:
        raise UnfitError(
            f"scheduler says base_image_seq_len {few} and max_image_seq_len {many}, allowed are rising ones"
        )


def require_channels(pipe: DiffusionPipeline, latent: int, patch: int = 2) -> None:
    """Check that a transformer takes its autoencoder's latents.

    In patches of `patch` x `patch`. Raises UnfitError otherwise.
    """
    wanted = latent * patch**2
    what = f"its autoencoder's latents have {latent} channels" + f", patches of them {wanted}" * (patch > 1)
    found = pipe.transformer.config.in_channels
    same("transformer", "in_channels", found, wanted, what, "pass a text-to-image model")


def _cogvideox(pipe: DiffusionPipeline) -> None:
    config, latent = pipe.transformer.config, pipe.vae.config.latent_channels
    if config.get("patch_size_t") is not None or config.get("ofs_embed_dim") is not None:
        raise UnfitError(
            "transformer says patch_size_t: it is CogVideoX 1.5, which fewstep does not read",
            "pass CogVideoX-2b or CogVideoX-5b",
        )
    same(
        "transformer",
        "in_channels",
        config.in_channels,
        latent,
        f"text-to-video with this autoencoder takes {latent} (twice as many are for video from images)",
        "pass a text-to-video model",
    )
    same("transformer", "out_channels", config.out_channels, latent, f"its latents have {latent}")
    number("vae", "scaling_factor", pipe.vae.config.scaling_factor)
    for key in ("latents_mean", "latents_std", "invert_scale_latents"):
        if pipe.vae.config.get(key):
            raise UnfitError(
                f"vae says {key}, which a CogVideoXPipeline does not read", "set it to null in vae/config.json"
            )
    for key in ("sample_height", "sample_width"):
        if whole("transformer", key, config[key]) % whole("transformer", "patch_size", config.patch_size):
            raise UnfitError(
                f"transformer says {key} {config[key]}, which is no multiple of its patch_size {config.patch_size}",
                SIZES,
            )
    every = whole("vae", "temporal_compression_ratio", pipe.vae.config.temporal_compression_ratio, most=64)
    same(
        "transformer",
        "temporal_compression_ratio",
        config.temporal_compression_ratio,
        every,
        f"its autoencoder says {every}",
    )
    if (whole("transformer", "sample_frames", config.sample_frames) - 1) % every:
        raise UnfitError(f"transformer says sample_frames {config.sample_frames}, allowed are {every} n + 1", SIZES)
    whole("transformer", "max_text_seq_length", config.max_text_seq_length)
    _texts("transformer", "text_embed_dim", config.text_embed_dim, pipe.text_encoder.config.d_model)
    number("scheduler", "snr_shift_scale", pipe.scheduler.config.get("snr_shift_scale", 1.0))
    table(pipe)
    require_prediction(pipe, ("epsilon", "v_prediction", "sample"))


def _wan(pipe: DiffusionPipeline) -> None:
    vae = pipe.vae.config
    for name in ("transformer", "transformer_2"):
        if (network := getattr(pipe, name)) is None:
            continue
        config = network.config
        for key in ("in_channels", "out_channels"):
            same(
                name,
                key,
                config[key],
                vae.z_dim,
                f"text-to-video with this autoencoder takes {vae.z_dim} (more are for video from images)",
                "pass a text-to-video model",
            )
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            same(name, key, config.get(key), None, "text-to-video takes no images", "pass a text-to-video model")
        patch = config.patch_size
        if not isinstance(patch, list | tuple) or len(patch) != 3:
            raise UnfitError(f"{name} says patch_size {_shown(patch)}, allowed are frames, height and width", SIZES)
        same(name, "patch_size", patch[0], 1, "allowed is a patch of one frame")
        for value in patch[1:]:
            whole(name, "patch_size", value, most=64)
        whole(name, "rope_max_seq_len", config.rope_max_seq_len)
        _texts(name, "text_dim", config.text_dim, pipe.text_encoder.config.d_model)
    for key in ("latents_mean", "latents_std"):
        values = vae[key]
        if not isinstance(values, list | tuple) or len(values) != vae.z_dim:
            raise UnfitError(f"vae says {key} {_shown(values)}, allowed are {vae.z_dim} numbers, one a channel", SIZES)
        for value in values:
            number("vae", key, value, positive=key == "latents_std")
    whole("vae", "scale_factor_temporal", vae.scale_factor_temporal, most=64)
    whole("vae", "scale_factor_spatial", vae.scale_factor_spatial, most=64)
    _boundary(pipe)
    flow(pipe)


def _boundary(pipe: DiffusionPipeline) -> None:
    """Check that two networks have a boundary, and one network none."""
    ratio = pipe.config.boundary_ratio
    if pipe.transformer is None:
        raise UnfitError("it has no transformer", "pass the whole pipeline")
    if pipe.transformer_2 is None:
        same("model_index.json", "boundary_ratio", ratio, None, "it has no transformer_2")
        return
    if number("model_index.json", "boundary_ratio", ratio) >= 1:
        raise UnfitError(f"model_index.json says boundary_ratio {ratio:g}, allowed are numbers between 0 and 1", SIZES)
    own = {k: v for k, v in pipe.transformer_2.config.items() if not k.startswith("_")}
    odd = next((k for k, v in own.items() if v != pipe.transformer.config.get(k)), None)
    if odd is not None:
        raise UnfitError(f"its transformer_2 has another {odd} than its transformer", SIZES)


def require_pixels(unet: UNet2DModel, labels: Sequence[str]) -> None:
    """Check that a pixel U-Net takes and gives images.

    The classes must be those named in `labels`. Raises UnfitError otherwise.
    """
    config = unet.config
    if config.in_channels not in (1, 3):
        raise UnfitError(
            f"unet says in_channels {_shown(config.in_channels)}, images have 1 or 3",
            "wrap your own network in fewstep.Denoiser",
        )
    same(
        "unet",
        "out_channels",
        config.out_channels,
        config.in_channels,
        f"its states have {config.in_channels} (a learned variance is not read)",
        "wrap your own network in fewstep.Denoiser",
    )
    for value in config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2:
        whole("unet", "sample_size", value)
    if isinstance(config.sample_size, list | tuple) and len(config.sample_size) != 2:
        raise UnfitError(
            f"unet says sample_size {_shown(config.sample_size)}, allowed are a number, or height and width", SIZES
        )
    same(
        "unet",
        "class_embed_type",
        config.class_embed_type,
        None,
        "classes are given by their number",
        "wrap your own network in fewstep.Denoiser",
    )
    classes = config.num_class_embeds
    if classes is not None and whole("unet", "num_class_embeds", classes, most=10**6) != len(labels) + 1:
        raise UnfitError(
            f"unet says num_class_embeds {classes}, labels.json names {len(labels)} classes",
            f"write {classes - 1} names, the last class being the one of no name",
        )
    if classes is None and labels:
        raise UnfitError(
            f"labels.json names {len(labels)} classes, the unet has none (num_class_embeds null)", "remove labels.json"
        )


def read_labels(file: Path) -> tuple[str, ...]:
    """Read the class names next to a pixel model.

    Empty where there is no such file. Raises UnfitError where the file is damaged.
    """
    if not file.exists():
        return ()
    inside(file, file.parent)
    try:
        names = json_in(file)
    except Exception as error:  # each kind of damage raises another type
        raise UnfitError(f"{file.name} is damaged ({reason(error)})") from error
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(n, str) and n for n in names)
        or len(set(names)) < len(names)
    ):
        raise UnfitError(f"{file.name} is no list of names, each another and none empty")
    return tuple(names)


def require_rows(name: str, words: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> None:
    """Check that a text encoder knows every token of `name`. Raises UnfitError."""
    rows = encoder.get_input_embeddings().weight.shape[0]
    if len(words) > rows:
        raise UnfitError(
            f"{name} has {len(words)} tokens, its text encoder {rows}",
            "resize the encoder's embeddings when tokens are added, and save both",
        )


def _tokenizers(pipe: DiffusionPipeline) -> None:
    """Check that tokenizers go with their text encoders.

    The words must be in the encoder's vocabulary. A tokenizer that names no length, or a longer one than its
    encoder, gets the encoder's.
    """
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        words, encoder = pipe.components.get(name), pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if not isinstance(words, PreTrainedTokenizerBase) or encoder is None:
            continue
        require_rows(name, words, encoder)
        most = getattr(encoder.config, "max_position_embeddings", None)
        if most is None:
            continue  # T5 has no last position: its pipelines limit the length of a prompt
        length = words.model_max_length
        if not isinstance(length, int) or length > most:
            words.model_max_length = most
            if isinstance(pipe, StableDiffusion3Pipeline) and name == "tokenizer":
                pipe.tokenizer_max_length = most
        elif length < 3:
            raise UnfitError(
                f"{name} says model_max_length {length}, allowed are 3 to {most}", "set it in tokenizer_config.json"
            )
