"""Picture files: opened here alone, upright, in colour on white, and refused where their colours cannot be known.

Colour profiles (ICC) are not applied: every picture is taken to be sRGB. Of an animation the first frame is read.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from .texts import printable

KINDS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # by content; a file may have another one's suffix
OTHERS = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".exr",
    ".hdr",
    ".tga",
    ".ico",
    ".ppm",
    ".pgm",
)
LARGEST = 178_956_970  # pixels; from here on Pillow takes a picture for a decompression bomb
PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
ORIENTATION, WHITE_IS_ZERO, BITS = 0x0112, 262, 258  # tags of EXIF and TIFF
WHITE = (255, 255, 255, 255)


@contextmanager
def opened(source: bytes | BinaryIO, name: str, option: str = "data.source") -> Iterator[Image.Image]:
    """A picture file whose header has been read, within the block.

    Raises ValueError with one line that names it for whatever goes wrong there: damage, a size or colours that are not read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd tags and of sizes, which are checked here
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                _require_readable(image)
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{option}: {printable(name)} is no picture of {', '.join(FORMATS)}, or damaged; remove it"
        ) from error
    except Exception as error:  # Pillow raises as many types as there are kinds of damage
        reason = printable(error).strip() or type(error).__name__
        raise ValueError(
            f"{option}: {printable(name)} cannot be read ({reason}); remove it, or save it again"
        ) from error


def _require_readable(image: Image.Image) -> None:
    if image.width * image.height > LARGEST:  # Pillow's own limit is a setting, and may be off
        raise ValueError(f"it is {image.width}x{image.height} pixels, allowed are {LARGEST:,} in all")
    if image.mode not in PLAIN and not _sixteen_bits(image):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, whose range no file says; allowed are 8 bits, or 16 without colour"
        )


def _sixteen_bits(image: Image.Image) -> bool:
    """Grey in 16 bits; older versions of Pillow read it from PNG as 32-bit numbers."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def in_colour(image: Image.Image) -> Image.Image:
    """An opened picture as RGB of 8 bits: turned as its EXIF says, 16 bits divided by 257, what is transparent in it white."""
    wide, white_is_zero, bits = _sixteen_bits(image), False, 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero, bits = image.tag_v2.get(WHITE_IS_ZERO) == 0, image.tag_v2.get(BITS, (16,))[0]
    image.load()  # TIFF is turned by this already
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    if wide:
        values = np.asarray(image).astype(np.int64)
        clear = values == image.info["transparency"] if isinstance(image.info.get("transparency"), int) else None
        grey = np.rint(values * (255 / (2**bits - 1))).clip(0, 255)
        grey = 255 - grey if white_is_zero else grey
        return Image.fromarray(
            np.where(clear, 255, grey).astype(np.uint8) if clear is not None else grey.astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), over).convert("RGB")
    return image.convert("RGB")


def squared(image: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 1] of an RGB picture: the square in its middle, scaled."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cut out before it is scaled: of a strip of 1 by 10,000 pixels the whole would be gigabytes.
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
