"""A run as one HTML file that needs nothing else.

The page has images, numbers, curves, cost, and what to do next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .furthest import furthest
from .grids import read_grid
from .images import Images
from .live import Metrics
from .page import PIXELATED, data_url, image_url, page
from .plots import charts
from .summary import Cost, Headline
from .table import Row, drift, table
from .words import duration

COLUMNS = 8  # prompts next to each other on a wide page
SHOWN_WARNINGS = 3  # the others unfold below


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    What is empty is left out of the page. `made` are facts on what was made, as (name, value). `rows` and
    `protocol` are those of eval.json, as are the sentences of `paired` comparisons, the faults that were found
    (`findings`, None where none was looked for) and where the prompts come from (`asked`). `metrics` are the
    records of metrics.jsonl, `samples` the grids of
    `samples/` as (iteration, PNG bytes). `trajectories` is what is known of the teacher's trajectories.
    `next_commands` are pairs of (what the command does, command).
    """

    title: str
    made: Sequence[tuple[str, str]] = ()
    summary: Sequence[Headline] = ()
    rows: Sequence[Row] = ()
    protocol: str = ""
    findings: Sequence[str] | None = None
    paired: Sequence[str] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    images: Images = field(default_factory=Images)
    samples: Sequence[tuple[int, bytes]] = ()
    metrics: Sequence[Metrics] = ()
    cost: Cost | None = None
    warnings: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trajectories: Mapping[str, Any] = field(default_factory=dict)
    next_commands: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """Render the report as HTML.

    Every text is escaped; nothing is loaded from anywhere.
    """
    prompts = list(enumerate(report.images.prompts))
    recipe = yaml.safe_dump(dict(report.recipe), sort_keys=False, allow_unicode=True) if report.recipe else ""
    return page(
        "report.html.j2",
        {
            "report": report,
            "table": table(report.rows),
            "drift": drift(report.rows),
            "furthest": furthest(report.images),
            "charts": charts(report.metrics, report.rows, report.trajectories),
            "samples": [(iteration, read_grid(data), data) for iteration, data in report.samples],
            "blocks": [prompts[i : i + COLUMNS] for i in range(0, len(prompts), COLUMNS)],
            "recipe": recipe,
            "image_url": image_url,
            "data_url": data_url,
            "pixelated": PIXELATED,
            "shown_warnings": SHOWN_WARNINGS,
            "duration": duration,
        },
    )
