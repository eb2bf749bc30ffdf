"""All families of diffusers pipelines that fewstep distils.

A new family is a file and a row in this table.
"""

from diffusers import DiffusionPipeline

from . import cogvideox, flux, flux2, krea2, pixart, qwenimage, sd, sd3, sdxl, unconditional, wan, zimage
from .family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        sd.FAMILY,
        sdxl.FAMILY,
        pixart.ALPHA,
        pixart.SIGMA,
        cogvideox.FAMILY,
        sd3.FAMILY,
        flux2.KLEIN,
        flux2.DEV,
        qwenimage.FAMILY,
        zimage.FAMILY,
        flux.FAMILY,
        krea2.FAMILY,
        wan.FAMILY,
        unconditional.DDPM,
        unconditional.CONSISTENCY,
    )
}

# Pipelines next to a family that somebody may take for it, and why they are none.
OTHERS = {
    "QwenImage21Pipeline": "Qwen-Image-2.1 is another network than Qwen-Image: text and image are one sequence in it, "
    "and its owners sample it without guidance; pass Qwen/Qwen-Image or Qwen/Qwen-Image-2512",
}


def unsupported(name: str) -> str:
    """Return what is said of a pipeline that is not supported.

    What there is instead, and what to do. `name` is the pipeline's class.
    """
    if name in OTHERS:
        return f"{name}, which is not supported: {OTHERS[name]}"
    return f"{name}, supported are {', '.join(FAMILIES)}; wrap your own network in fewstep.Denoiser"


def family_of_pipeline(pipe: DiffusionPipeline) -> Family:
    """Return the family of a pipeline.

    Raises ValueError if the pipeline is not supported.
    """
    found = next((family for family in FAMILIES.values() if isinstance(pipe, family.pipeline)), None)
    if found is None:
        raise ValueError(f"base: got a {unsupported(type(pipe).__name__)}")
    return found
