"""What fewstep needs to know of a family of pipelines.

Each family has one row, at the end of its own file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import Tensor


@dataclass(frozen=True)
class ComfyParts:
    """How ComfyUI loads a model whose parts are files of their own.

    The files have the names under which they are published for it.
    """

    latent: str  # node for empty latents
    encoder: str  # file of the text encoder
    kind: str  # what the node CLIPLoader calls the encoder
    vae: str  # file of the autoencoder
    latent_takes_vae: bool = False
    fps: int = 0  # of videos; 0 for images
    second_encoder: str = ""  # file of a second text encoder
    # Node that sets the shift of time; empty where the model's own will do, and noise levels are always given.
    shift: str = "ModelSamplingSD3"
    told: bool = False  # whether the network is told the guidance scale


@dataclass(frozen=True)
class Family:
    """A diffusers pipeline and the backbone around it.

    `from_pipeline(pipe, name)` makes the backbone.
    """

    pipeline: type[DiffusionPipeline]
    from_pipeline: Callable[[Any, str], Any]
    # Parts that are loaded otherwise than the pipeline's folder says.
    parts: Mapping[str, Any] = field(default_factory=dict)
    takes_prompts: bool = True
    # How its pipeline is told a student's own times, with a scheduler that its students have; empty: in no way.
    told_by: Literal["timesteps", "sigmas", ""] = "timesteps"
    video: bool = False
    # How `pipe(prompt, ...)` is told a guidance scale, 1 being none, for so many prompts.
    guidance: Callable[[float, int], Mapping[str, Any]] = lambda scale, count: {"guidance_scale": scale}
    # Side of the patches that the pipeline hands its scheduler as tokens [B, N, C]; 0: states as they are.
    patch: int = 0
    # Whether its stock pipeline draws a prompt otherwise next to longer ones: fewstep compares with one at a time.
    alone: bool = False
    # A package that its pipeline needs in stock diffusers, beyond diffusers' own.
    needs: str = ""
    # States [B, ...] as `pipe(latents=...)` takes them.
    latents: Callable[[Tensor], Tensor] = lambda states: states
    # Classes of parts whose annotation in the pipeline names a base class alone, or that are read otherwise.
    kinds: Mapping[str, type] = field(default_factory=dict)
    # Raises UnfitError for settings that the backbone does not follow.
    check: Callable[[Any], None] = lambda pipe: None
    # Options of `pipe(prompt, ...)` with which the pipeline takes the prompt unchanged.
    call_options: Callable[[Any], Mapping[str, Any]] = lambda pipe: {}
    # Layers of the family's networks in the original programs: pairs of diffusers' name and the original one.
    # Several in turn may be the rows of one original layer.
    original_names: Callable[[Any], Iterable[tuple[str, str]]] = lambda network: ()
    # Whether a student's file for other programs has these names: ComfyUI knows diffusers' names of most transformers.
    writes_original: bool = False
    # ComfyUI's node for empty latents; empty if ComfyUI loads no checkpoint of the family by itself.
    comfyui_latent: str = ""
    # The same for models whose parts are files of their own, by the pipeline.
    comfyui_parts: Callable[[Any], ComfyParts | None] = lambda pipe: None
    # Whose layer names kohya's scripts use for the family's U-Net; empty without a U-Net.
    kohya: Literal["", "diffusers", "original"] = ""

    @property
    def name(self) -> str:
        """Name of the pipeline's class, as in `model_index.json`."""
        return self.pipeline.__name__
