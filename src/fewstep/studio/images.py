"""Images that hold their settings, and previews taken apart."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..data.image_files import opened
from ..reading import json_of, reading
from ..report.grids import Grid, read_grid
from ..report.images import png
from ..report.page import data_url
from ..typed import typed
from . import words

KEY = "fewstep.sample"
STEP = "step_*.png"
PIXELS = 160  # smaller images are enlarged pixel by pixel


@dataclass(frozen=True)
class Settings:
    """How an image was sampled.

    `guidance` is None where it is baked in; `solver` is empty for the student's own.
    """

    student: str
    prompt: str
    seed: int
    count: int
    steps: int
    solver: str
    guidance: float | None
    version: str


def with_settings(image: Image.Image, settings: Settings) -> bytes:
    """Return an image as PNG that holds its settings."""
    own = image.copy()
    own.info[KEY] = json.dumps(asdict(settings))
    return png(own)


def settings_in(path: Path) -> Settings:
    """Read the settings of an image that the studio has made.

    Raises ValueError for any other image.
    """
    with reading(path.name, "drop a PNG that the studio has made", "is no such image"):
        with opened(path.read_bytes(), path.name, "image") as found:
            found.load()
            told = found.info.get(KEY)
        if told is None:
            raise ValueError("it holds no settings of fewstep")
        settings: Settings = typed(Settings, json_of(told))
        return settings


def previews(run: Path) -> list[tuple[int, Path]]:
    """Return (iteration, file) of a run's previews, in order."""
    found = [(p.stem.rpartition("_")[2], p) for p in (run / "samples").glob(STEP)]
    return sorted((int(n), p) for n, p in found if n.isdecimal())


def grid_of(path: Path) -> Grid | None:
    """Read a preview.

    None where the file is no grid, or is being written.
    """
    try:
        with reading(path, "wait for the next"):
            return read_grid(path.read_bytes())
    except ValueError:
        return None


def strips(grid: Grid) -> str:
    """Return a preview as HTML.

    A row for each model, an image for each prompt.
    """
    pixels = max(grid.width, grid.height) <= PIXELS
    rows = []
    for label, row in zip(grid.labels, grid.tiles, strict=True):
        shown = [words.image(data_url(tile), prompt, pixels) for tile, prompt in zip(row, grid.prompts, strict=True)]
        rows.append(words.strip(label, shown))
    return "".join(rows) or words.note("The preview holds no images.")


def wipe(grid: Grid, prompt: int, row: str) -> tuple[Image.Image, Image.Image] | None:
    """Return (teacher, student) of one prompt, large enough to look at.

    The teacher is the first row; `row` names the student's. None where there is no student.
    """
    rows = student_rows(grid)
    if not rows:
        return None
    at = grid.labels.index(row if row in rows else rows[0])
    column = min(max(prompt, 0), len(grid.prompts) - 1)

    def tile(r: int) -> Image.Image:
        with opened(grid.tiles[r][column], f"tile {column} of {grid.labels[r]}", "preview") as found:
            return enlarged(found)

    return tile(0), tile(at)


def student_rows(grid: Grid) -> list[str]:
    """Return the labels of the rows that a teacher is compared with."""
    return [label for label in grid.labels[1:] if not label.startswith("teacher")]


def enlarged(image: Image.Image, least: int = 384) -> Image.Image:
    """Return a small image enlarged by a whole factor, pixel by pixel."""
    factor = max(1, least // max(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def prompts_of(grid: Grid) -> Sequence[tuple[str, int]]:
    """Return (prompt, its place) for a list to choose from."""
    return [(f"{i + 1}. {prompt}", i) for i, prompt in enumerate(grid.prompts)]
