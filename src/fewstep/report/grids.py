"""Labelled grids of images as one PNG.

A grid has a row for each model and a column for each prompt. `read_grid` takes a written grid apart again.
"""

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..atomic import write_bytes
from .images import png, to_pil

SMALLEST = 96  # pixels: smaller images are enlarged by a whole factor
GAP, MARGIN, FONT_SIZE, LINE = 6, 14, 13, 17
PROMPT_LINES, LABEL_LINES, LABEL_CHARACTERS = 4, 6, 20
PAPER, INK, FAINT = (255, 255, 255), (29, 29, 31), (107, 107, 112)
WORDS = "fewstep"  # the key of the PNG's text that holds the layout


@dataclass(frozen=True)
class Grid:
    """A grid taken apart into tiles.

    `tiles[r][c]` are PNG bytes, without enlargement, of the image for `labels[r]` and `prompts[c]`.
    """

    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    tiles: tuple[tuple[bytes, ...], ...]
    width: int
    height: int


def write_grid(path: Path, images: Tensor, labels: Sequence[str], prompts: Sequence[str]) -> Path:
    """Write images as a labelled grid in one PNG.

    `images` `[rows, columns, 3, H, W]` are in [0, 1]. `labels` stand at the left and `prompts` above, both
    wrapped. Images below 96 pixels are enlarged by a whole factor, nearest neighbour, so that every pixel
    keeps its value. The file appears complete or not at all. Letters that Pillow's own font lacks (Chinese,
    say) become boxes; the report shows these letters.

    Raises ValueError where labels or prompts do not fit the tensor.
    """
    if images.ndim != 5 or images.shape[:3] != (len(labels), len(prompts), 3):
        allowed = f"[{len(labels)}, {len(prompts)}, 3, H, W]: a row for each label, a column for each prompt"
        raise ValueError(f"grid: images are {list(images.shape)}, allowed is {allowed}")
    return write_bytes(path, png(draw_grid(images, labels, prompts)))


def require_png(data: bytes) -> bytes:
    """Return the bytes if they are a whole PNG image.

    Raises whatever Pillow does.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as found:
        found.load()
    return data


def read_grid(data: bytes) -> Grid | None:
    """Take a grid written by `write_grid` apart.

    Returns None for any other image, and for a grid from before the layout was written into the file.
    """
    try:
        sheet = Image.open(io.BytesIO(data))
        about = json.loads(sheet.info[WORDS])
        labels, prompts = (tuple(str(word) for word in about[key]) for key in ("labels", "prompts"))
        left, top, width, height, down, factor = (
            int(about[key]) for key in ("left", "top", "width", "height", "down", "factor")
        )
        right, bottom = left + len(prompts) * (width + GAP) - GAP, top + (len(labels) - 1) * down + height
        if not (
            0 <= left <= right <= sheet.width
            and 0 <= top <= bottom <= sheet.height
            and width >= factor > 0
            and height >= factor
        ):
            return None
        tiles = tuple(
            tuple(
                _tile(sheet, x, y, width, height, factor)
                for x in range(left, left + len(prompts) * (width + GAP), width + GAP)
            )
            for y in range(top, top + len(labels) * down, down)
        )
    except (OSError, KeyError, TypeError, ValueError, Image.DecompressionBombError):
        return None
    return Grid(labels, prompts, tiles, width // factor, height // factor)


def _tile(sheet: Image.Image, x: int, y: int, width: int, height: int, factor: int) -> bytes:
    """Return one image of a grid as PNG, without enlargement."""
    tile = sheet.crop((x, y, x + width, y + height)).resize(
        (width // factor, height // factor), Image.Resampling.NEAREST
    )
    tile.info.clear()
    return png(tile)


def draw_grid(images: Tensor, labels: Sequence[str], prompts: Sequence[str]) -> Image.Image:
    """Draw the grid of `write_grid` as an image."""
    font = ImageFont.load_default(FONT_SIZE)
    factor = enlargement(images.shape[-2], images.shape[-1])
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    captions = [wrap(p, width, PROMPT_LINES, font) for p in prompts]
    names = [wrap(label, LABEL_CHARACTERS * FONT_SIZE // 2, LABEL_LINES, font) for label in labels]
    left = MARGIN + max((int(font.getlength(line)) + MARGIN for lines in names for line in lines), default=0)
    top = MARGIN + LINE * max(map(len, captions), default=0) + GAP
    cell_height = max([height, *(LINE * len(n) for n in names)]) + GAP
    sheet = Image.new(
        "RGB",
        (left + len(prompts) * (width + GAP) - GAP + MARGIN, top + len(labels) * cell_height - GAP + MARGIN),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        _text(pen, left + column * (width + GAP), top - GAP - LINE * len(lines), lines, font, FAINT)
    for row, lines in enumerate(names):
        y = top + row * cell_height
        _text(pen, MARGIN, y + (height - LINE * len(lines)) // 2, lines, font, INK)
        for column in range(len(prompts)):
            found = to_pil(images[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(found, (left + column * (width + GAP), y))
    words = {"labels": list(labels), "prompts": list(prompts)}
    places = {"left": left, "top": top, "width": width, "height": height, "down": cell_height, "factor": factor}
    sheet.info[WORDS] = json.dumps(words | places)
    return sheet


def enlargement(height: int, width: int) -> int:
    """Return the whole factor by which small images are enlarged.

    The factor is the smallest that brings the shorter side to at least 96 pixels.
    """
    return max(1, -(-SMALLEST // min(height, width)))


def wrap(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Wrap `text` into at most `lines` lines of `width` pixels.

    Where there is more text, the last line ends with an ellipsis.
    """
    widest = range(min(len(text), width // 2), 0, -1)  # no letter is narrower than two pixels
    characters = next((n for n in widest if all(font.getlength(part) <= width for part in textwrap.wrap(text, n))), 1)
    return textwrap.wrap(text, characters, max_lines=lines, placeholder="…")


def _text(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ink: tuple[int, int, int],
) -> None:
    for i, line in enumerate(lines):
        pen.text((x, y + i * LINE), line, ink, font)
