"""HTML pages that need nothing else.

All pages share one look. Every text is escaped, and nothing is loaded from anywhere.
"""

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from .images import png, to_pil
from .video import FPS

PIXELATED = 160  # images up to this many pixels are enlarged pixel by pixel, larger images smoothly
EXACT = 256  # images up to this many pixels are embedded without loss
QUALITY = 95  # of WebP for larger images


def page(template: str, values: Mapping[str, Any]) -> str:
    """Render one of the templates beside this module."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def data_url(data: bytes, kind: str = "png") -> str:
    """Return the bytes of an image as a `data:` address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_url(image: Tensor) -> str:
    """Return an image as a `data:` address with its exact pixels.

    The image is `[3, H, W]` in [0, 1].
    """
    return data_url(png(to_pil(image)))


def small_url(image: Tensor) -> str:
    """Return an image or a clip as a short `data:` address.

    Images `[3, H, W]` of up to 256 pixels are exact, larger images are WebP of quality 95. Clips
    `[F, 3, H, W]` are animated WebP without end, lossless up to 256 pixels. Nothing but pixels is in the
    bytes.
    """
    exact = max(image.shape[-2:]) <= EXACT
    if image.ndim == 3 and exact:
        return image_url(image)
    frames = [to_pil(frame) for frame in (image if image.ndim == 4 else image[None])]
    return data_url(webp(frames, exact), "webp")


def webp(frames: list[Image.Image], lossless: bool) -> bytes:
    """Encode frames as WebP, animated where there are several."""
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "WEBP",
        save_all=len(frames) > 1,
        append_images=frames[1:],
        duration=round(1000 / FPS),
        loop=0,
        lossless=lossless,
        quality=QUALITY,
        minimize_size=False,
    )
    return buffer.getvalue()
