"""What the rest of fewstep needs to know of a family of pipelines. Each family has one row, at the foot of its own file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """A diffusers pipeline and the backbone around it. The backbone is made by `from_pipeline(pipe, name)`."""

    pipeline: type[DiffusionPipeline]
    from_pipeline: Callable[[Any, str], Any]
    parts: Mapping[str, Any] = field(
        default_factory=dict
    )  # parts that are loaded otherwise than the pipeline's folder says
    takes_prompts: bool = True
    takes_times: bool = True  # `timesteps=...`, with a scheduler that its students have
    video: bool = False
    call_options: Callable[[Any], Mapping[str, Any]] = (
        lambda pipe: {}
    )  # of `pipe(prompt, ...)`, so that it takes the prompt as it is
    comfyui_latent: str = (
        ""  # ComfyUI's node for empty latents; empty if ComfyUI loads no checkpoint of the family by itself
    )
    kohya: Literal["", "diffusers", "original"] = (
        ""  # whose layer names kohya's scripts use for its U-Net; empty for no U-Net
    )

    @property
    def name(self) -> str:
        """The pipeline's class, as `model_index.json` names it."""
        return self.pipeline.__name__
