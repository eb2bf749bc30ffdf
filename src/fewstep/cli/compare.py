"""`fewstep compare`: students side by side, on the same prompts and noise."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..atomic import write_json, write_text
from ..backbones.load import quiet
from ..evaluation.distances import paired_distance
from ..evaluation.features import feature_network, features
from ..evaluation.motion import motion
from ..report.comparison import Comparison, comparison_markdown, comparison_page
from ..report.grids import write_grid
from ..report.video import strip
from ..runs.lineup import Drawn
from ..training.monitor import look
from .lineup import KEPT, Lineup, bases_of, draw_lineup, sources_of, stacked, wished_prompts
from .preflight import require_output
from .progress import console, put_result, working

SHEET, TABLE, VALUES, PAGE = "comparison.png", "comparison.md", "comparison.json", "comparison.html"


def run_compare(
    given: Sequence[str], asked: Sequence[str], prompts: str, teacher: bool, base: str | None, out: Path
) -> None:
    """Sample the models, and write a sheet, a table and a page.

    `asked` are prompts that stand for `prompts`. The same command again goes on where it stopped. Raises
    ValueError with one line.
    """
    quiet()
    for name in (SHEET, TABLE, VALUES, PAGE):
        require_output(out / name, "--out")
    sources = sources_of(given)
    if not sources or (len(sources) < 2 and not teacher):
        raise ValueError("RUN: name two students or more, or one beside its teacher")
    if odd := next((p for p in asked if not p.strip()), None):
        raise ValueError(f"--prompt: got {odd!r}, an empty prompt; name one, e.g. -p rocket")
    wished = list(asked) or wished_prompts(prompts)
    bases = [base] if base is not None else bases_of(sources)
    notes = [] if len(bases) == 1 else [f"These students have different bases: {', '.join(bases)}."]
    for note in notes:
        console.print(f"note: {note}")
    lineup = draw_lineup(sources, wished, teacher, base, out / KEPT)
    images = stacked(lineup)
    with working("measuring the images"):
        compared = measured(lineup, images, notes)
    values = values_of(lineup, compared)
    write_json(out / VALUES, values)
    text = write_text(out / TABLE, comparison_markdown(compared))
    names = [d.entry.name for d in lineup.drawn]
    sheet = write_grid(out / SHEET, torch.stack([strip(x) for x in images]), names, lineup.shots.prompts)
    page = write_text(out / PAGE, comparison_page(compared))
    for line in table_lines(compared):
        console.print(line)
    for path in (page, sheet, text):
        console.print(str(path.resolve()))
    put_result({**values, "files": [path.resolve() for path in (page, sheet, text, out / VALUES)]})


def measured(lineup: Lineup, images: Sequence[Tensor], notes: Sequence[str]) -> Comparison:
    """Measure the images of every model.

    A student is compared with the teacher of its own base, image by image; students of one base with each
    other.
    """
    network = feature_network()
    seen = [features(network, _frames(x)) for x in images]
    drawn = lineup.drawn
    teachers = {d.entry.identity: i for i, d in enumerate(drawn) if d.entry.role == "teacher"}
    rows = [
        _row(d, x, own, None if (t := teachers.get(d.entry.teacher)) is None or t == i else (drawn[t], seen[t]))
        for i, (d, x, own) in enumerate(zip(drawn, images, seen, strict=True))
    ]
    students = [i for i, d in enumerate(drawn) if d.entry.role == "student"]
    between = [
        (drawn[a].entry.name, drawn[b].entry.name, paired_distance(seen[a], seen[b]))
        for a, b in combinations(students, 2)
        if drawn[a].entry.base == drawn[b].entry.base
    ]
    return Comparison(lineup.shots.prompts, rows, images, between, notes)


def _frames(images: Tensor) -> Tensor:
    """Return images, or all frames of clips, as `[N, 3, H, W]`."""
    return images.flatten(0, 1) if images.ndim == 5 else images


def _row(drawn: Drawn, images: Tensor, own: Tensor, teacher: tuple[Drawn, Tensor] | None) -> dict[str, Any]:
    """Return the numbers of one model."""
    entry, clips = drawn.entry, images.ndim == 5
    seen = look(images, motions=motion(images) / 255 if clips else None)
    return {
        "model": entry.name,
        "role": entry.role,
        "base": entry.base,
        "steps": entry.steps,
        "guidance": entry.guidance,
        "nfe": entry.nfe,
        "seconds_per_image": drawn.seconds,
        "speedup": None if teacher is None else teacher[0].seconds / drawn.seconds,
        "to_teacher": None if teacher is None else paired_distance(own, teacher[1]),
        "brightness": seen.brightness,
        "saturation": seen.saturation,
        "contrast": seen.contrast,
        "motion": seen.motion if clips else None,
    }


def values_of(lineup: Lineup, compared: Comparison) -> dict[str, Any]:
    """Return the numbers of a comparison as JSON values."""
    return {
        "version": __version__,
        "prompts": list(lineup.shots.prompts),
        "seeds": list(lineup.shots.seeds),
        "notes": list(compared.notes),
        "models": list(compared.rows),
        "between": [{"a": a, "b": b, "distance": distance} for a, b, distance in compared.between],
    }


def table_lines(compared: Comparison) -> list[str]:
    """Return the table for a terminal, with its columns in line."""
    found = compared.table
    texts = [[c.heading for c in found.columns], *([c.text for c in cells] for cells in found.cells)]
    wide = [max(len(row[i]) for row in texts) for i in range(len(found.columns))]
    return ["  ".join(t.ljust(w) if not i else t.rjust(w) for i, (t, w) in enumerate(zip(row, wide, strict=True)))
            for row in texts]  # fmt: skip
