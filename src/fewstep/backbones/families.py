"""All families of diffusers pipelines that fewstep distils.

A new family is a file and a row in this table.
"""

from diffusers import DiffusionPipeline

from . import cogvideox, flux, flux2, krea2, pixart, qwenimage, qwenimage21, sd, sd3, sdxl, unconditional, wan, zimage
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
        qwenimage21.FAMILY,
        zimage.FAMILY,
        flux.FAMILY,
        krea2.FAMILY,
        wan.FAMILY,
        unconditional.DDPM,
        unconditional.CONSISTENCY,
    )
}


def unsupported(name: str) -> str:
    """Return what is said of a pipeline that is not supported.

    What there is instead, and what to do. `name` is the pipeline's class.
    """
    return f"{name}, supported are {', '.join(FAMILIES)}; wrap your own network in fewstep.Denoiser"


def family_of_pipeline(pipe: DiffusionPipeline) -> Family:
    """Return the family of a pipeline.

    Raises ValueError if the pipeline is not supported.
    """
    found = next((family for family in FAMILIES.values() if isinstance(pipe, family.pipeline)), None)
    if found is None:
        raise ValueError(f"base: got a {unsupported(type(pipe).__name__)}")
    return found
