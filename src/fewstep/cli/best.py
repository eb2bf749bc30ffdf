"""The best student of a run, kept next to the last.

Distribution matching can make a student worse after having made the student better.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..evaluation.metrics import METRICS
from ..report.live import read_metrics, series
from ..report.run import BEST, BEST_FILE, best_preview
from ..report.words import finite, plural
from ..runs.recipe import DistillRecipe

PATIENCE = 3  # previews in a row without improvement before a warning


@dataclass(frozen=True)
class Best:
    """The preview whose student lies in `best/`.

    `measured` is the key of `value` in metrics.jsonl.
    """

    iteration: int
    value: float
    measured: str


def measured_by(recipe: DistillRecipe, quality: Mapping[str, Any]) -> str:
    """Return the key of a preview's quality in metrics.jsonl.

    `quality` are the numbers of the recipe's protocol. The key is that of `preview.best_by`, by default the distance
    to real images, or else to the teacher's. Without a protocol, the quality is the distance of the previews to the
    teacher's previews (`preview.distance`).
    """
    if recipe.preview.protocol is None:
        return "preview.distance"
    usual = "fd_teacher" if quality.get("fd_real") is None else "fd_real"
    return f"quality.{recipe.preview.best_by or usual}"


def loss_of(measured: str, value: float) -> float:
    """Return a number that is smaller where a value is better."""
    metric = METRICS.get(measured.removeprefix("quality."))
    return -value if metric is not None and metric.better == "high" else value


def read_best(run: Path, measured: str) -> Best | None:
    """Read which preview lies in `run/best`.

    Returns None where there is no preview, or where the preview was measured under another key.
    """
    found = best_preview(run)
    return Best(int(found["iteration"]), float(found["value"]), measured) if found.get("measured") == measured else None


def missed(run: Path, last: int) -> str:
    """Say that a run's last preview was not the best.

    The run has `last` iterations. Called at the end of a run. Returns an empty text where the last preview was the
    best, or where no student was kept.
    """
    measured = best_preview(run).get("measured", "")
    best, values = (
        read_best(run, measured),
        dict(zip(*series(read_metrics(run / "metrics.jsonl"), measured), strict=True)),
    )
    if best is None or best.iteration >= last or last not in values:
        return ""
    return (
        f"{run / BEST}: the student of iteration {best.iteration}, "
        f"{measured} {best.value:.4g} where the last has {values[last]:.4g}"
    )


def stalled(run: Path, recipe: DistillRecipe) -> bool:
    """Return whether the previews have stopped improving.

    They have where the best is `preview.patience` previews ago. Read from metrics.jsonl, so that a run that ended
    early stays so when its command is run again.
    """
    patience, metrics = recipe.preview.patience, read_metrics(run / "metrics.jsonl")
    if patience is None:
        return False
    quality: Mapping[str, Any] = next((m["quality"] for m in reversed(metrics) if m.get("quality")), {})
    measured = measured_by(recipe, quality)
    iterations, values = series(metrics, measured)
    pairs = zip(iterations, values, strict=True)
    past = [(loss_of(measured, v), i) for i, v in pairs if i == 0 or i > recipe.method.warmup]
    return bool(past) and sum(i > min(past)[1] for _, i in past) >= patience


def keep_best(run: Path, now: Best, write: Callable[[Path], object], warmup: int = 0) -> list[str]:
    """Write the student to `run/best` if none before was better.

    Returns a warning after every `PATIENCE` previews in a row that are no better, else an empty list.

    Earlier values come from metrics.jsonl, whose first value is that of the initial student, and from
    `run/best`, which a run that resumes from an earlier checkpoint keeps. A value that is not finite is
    never the best. In the first `warmup` iterations the student is not trained yet, and nothing is kept.
    """
    if now.iteration <= warmup:
        return []
    best, folder, own = read_best(run, now.measured), run / BEST, loss_of(now.measured, now.value)
    if finite(now.value) and (best is None or own < loss_of(now.measured, best.value)):
        write(folder)
        write_json(folder / BEST_FILE, asdict(now))
    values = zip(*series(read_metrics(run / "metrics.jsonl"), now.measured), strict=True)
    past = [(i, v) for i, v in values if i < now.iteration and (i == 0 or i > warmup)]
    if not past:
        return []
    iteration, value = min(past, key=lambda p: loss_of(now.measured, p[1]))
    since = sum(i > iteration for i, _ in past) + 1
    if own < loss_of(now.measured, value) or since % PATIENCE:
        return []
    worse = (
        f"{plural(since, 'preview')} in a row no better than iteration {iteration}'s, "
        f"{now.measured} {now.value:.4g} against {value:.4g}"
    )
    if best is None or iteration == 0:
        return [f"{worse}, the student as it began; stop with Ctrl-C and lower train.lr or method.guidance"]
    return [
        f"{worse}; {folder} has the student of iteration {best.iteration}: stop with Ctrl-C, or go on and take it later"
    ]
