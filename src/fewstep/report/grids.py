"""Labelled grids of pictures as one PNG: a row for each model, a column for each prompt. A grid that was written can be taken apart again."""

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..atomic import write_bytes
from .pictures import png, to_pil

SMALLEST = 96  # pixels: smaller pictures are enlarged by a whole factor
GAP, MARGIN, FONT_SIZE, LINE = 6, 14, 13, 17
PROMPT_LINES, LABEL_LINES, LABEL_CHARACTERS = 4, 6, 20
PAPER, INK, FAINT = (255, 255, 255), (29, 29, 31), (107, 107, 112)
WORDS = "fewstep"  # the PNG's text that says what stands where


@dataclass(frozen=True)
class Grid:
    """A grid taken apart: `tiles[r][c]` as PNG bytes, without enlargement, for `labels[r]` and `prompts[c]`."""

    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    tiles: tuple[tuple[bytes, ...], ...]
    width: int
    height: int


def write_grid(path: Path, images: Tensor, labels: Sequence[str], prompts: Sequence[str]) -> Path:
    """Write `images` `[rows, columns, 3, H, W]` in [0, 1] with `labels` at the left and `prompts` above, both wrapped.

    Pictures below 96 pixels are enlarged by a whole factor, nearest neighbour, so every pixel stays what it was. The file
    appears complete or not at all. Letters that Pillow's own font lacks (Chinese, say) are drawn as boxes; the report shows them. Raises ValueError where labels or prompts do not fit the tensor.
    """
    if images.ndim != 5 or images.shape[:3] != (len(labels), len(prompts), 3):
        allowed = f"[{len(labels)}, {len(prompts)}, 3, H, W]: a row for each label, a column for each prompt"
        raise ValueError(f"grid: images are {list(images.shape)}, allowed is {allowed}")
    return write_bytes(path, png(draw_grid(images, labels, prompts)))


def require_png(data: bytes) -> bytes:
    """The same, if it is a whole PNG picture. Raises whatever Pillow does."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        picture.load()
    return data


def read_grid(data: bytes) -> Grid | None:
    """The pictures and words of a grid that `write_grid` made; None of any other picture, or of one from before they were written down."""
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
    """One picture of a grid as PNG, each of its pixels once."""
    tile = sheet.crop((x, y, x + width, y + height)).resize(
        (width // factor, height // factor), Image.Resampling.NEAREST
    )
    tile.info.clear()
    return png(tile)


def draw_grid(images: Tensor, labels: Sequence[str], prompts: Sequence[str]) -> Image.Image:
    """The grid of `write_grid` as a picture."""
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
            picture = to_pil(images[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (width + GAP), y))
    words = {"labels": list(labels), "prompts": list(prompts)}
    places = {"left": left, "top": top, "width": width, "height": height, "down": cell_height, "factor": factor}
    sheet.info[WORDS] = json.dumps(words | places)
    return sheet


def enlargement(height: int, width: int) -> int:
    """The smallest whole factor that brings the shorter side to at least 96 pixels."""
    return max(1, -(-SMALLEST // min(height, width)))


def wrap(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels, the last one shortened with an ellipsis where there is more."""
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
