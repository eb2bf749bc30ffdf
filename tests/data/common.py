"""Image files, and what is read of their captions."""

import io
from pathlib import Path

from PIL import Image

from fewstep.data.captioned import read_images


def png(colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def captions(source: Path) -> dict[str, str]:
    return {p.name: p.caption for p in read_images(str(source))[0]}
