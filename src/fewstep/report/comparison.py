"""Models side by side on the same prompts and noise.

A table, and a page with a slider between two images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .markdown import cell, markdown_table
from .page import PIXELATED, page, small_url
from .table import Column, Row, Table, table

COLUMNS = (
    Column("model", "Model"),
    Column("nfe", "Network evaluations"),
    Column("seconds_per_image", "Time per image", 3, "low", "s"),
    Column("speedup", "Faster than the teacher", 1, "high", "×"),
    Column("to_teacher", "Distance to the teacher", 3, "low"),
    Column("brightness", "Brightness", 3),
    Column("saturation", "Saturation", 3),
    Column("contrast", "Contrast", 3),
    Column("motion", "Motion", 3),
)
NOTE = (
    "Distance to the teacher: how far the features of an image are from those of the teacher's image of the same "
    "prompt and noise, relative to their length, averaged over prompts; 0 is the same image. With few prompts it "
    "ranks models that differ much, and nothing else. Brightness, saturation and contrast are averages over pixels "
    "from 0 to 1: where they leave the teacher's, colours drift. Time: of an image in the fastest batch, decoding "
    "included."
)
BETWEEN = "Distance between two students, in the same unit"


@dataclass(frozen=True)
class Comparison:
    """What models sampled for the same prompts and noise.

    `rows` has a row of `COLUMNS` for every model. `images` has, for every model, images `[N, 3, H, W]` or
    clips `[N, F, 3, H, W]` in [0, 1]; all are of one size. `between` has the distances between students.
    """

    prompts: Sequence[str]
    rows: Sequence[Row]
    images: Sequence[Tensor]
    between: Sequence[tuple[str, str, float]] = ()
    notes: Sequence[str] = ()

    @property
    def table(self) -> Table:
        """The rows as a table."""
        return table(self.rows, COLUMNS)


def comparison_page(compared: Comparison) -> str:
    """Render the page of a comparison.

    A slider between any two models, all images of a prompt, and the table.
    """
    names = [str(row["model"]) for row in compared.rows]
    height, width = compared.images[0].shape[-2:]
    last = len(names) - 1
    return page(
        "comparison.html.j2",
        {
            "title": " · ".join(names),
            "compared": compared,
            "table": compared.table,
            "note": NOTE,
            "between": BETWEEN,
            "images": (small_url(image) for own in compared.images for image in own),
            "width": width,
            "height": height,
            "pixels": max(height, width) <= PIXELATED,
            "shown": {"names": names, "prompts": list(compared.prompts), "left": last, "right": 0},
        },
    )


def comparison_markdown(compared: Comparison) -> str:
    """Return the table as a page of Markdown."""
    found = compared.table
    lines = ["# Side by side", "", *(f"{cell(note)}\n" for note in compared.notes)]
    rows = [[f"{c.text} (best)" if c.best else c.text for c in cells] for cells in found.cells]
    lines += [*markdown_table([c.heading for c in found.columns], rows), "", NOTE, ""]
    if compared.between:
        pairs = [(a, b, f"{distance:.3f}") for a, b, distance in compared.between]
        lines += [*markdown_table(("A", "B", BETWEEN), pairs), ""]
    lines += ["Prompts:", "", *(f"- {cell(prompt)}" for prompt in compared.prompts if prompt)]
    return "\n".join(lines) + "\n"
