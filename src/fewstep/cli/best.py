"""The best student that a run has shown, kept beside the last one: distribution matching can get worse after it got better."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import write_json
from ..report.live import read_metrics, series
from ..report.run import BEST, BEST_FILE, best_preview
from ..report.words import finite, plural
from ..runs.recipe import DistillRecipe

PATIENCE = 3  # previews in a row that are no better, after which it is said


@dataclass(frozen=True)
class Best:
    """The preview whose student lies in `best/`. `measured` is the key in metrics.jsonl: of two values the smaller is better."""

    iteration: int
    value: float
    measured: str


def measured_by(recipe: DistillRecipe) -> str:
    """The key in metrics.jsonl of a preview's quality: the distance to real pictures where it is measured, else that of the previews to the teacher's."""
    return "preview.distance" if recipe.preview.protocol is None else "quality.fd_real"


def read_best(run: Path, measured: str) -> Best | None:
    """What lies in `run/best`, None where nothing does, or nothing that was measured in this way."""
    found = best_preview(run)
    return Best(int(found["iteration"]), float(found["value"]), measured) if found.get("measured") == measured else None


def missed(run: Path, recipe: DistillRecipe) -> str:
    """What to say at the end of a run whose last preview was not the best one; empty where it was, or where nothing was kept."""
    measured, last = measured_by(recipe), recipe.train.iterations
    best, values = (
        read_best(run, measured),
        dict(zip(*series(read_metrics(run / "metrics.jsonl"), measured), strict=True)),
    )
    if best is None or best.iteration >= last or last not in values:
        return ""
    return f"{run / BEST}: the student of iteration {best.iteration}, {measured} {best.value:.4g} where the last has {values[last]:.4g}"


def keep_best(run: Path, now: Best, write: Callable[[Path], object], warmup: int = 0) -> list[str]:
    """Have the student written to `run/best` if none so far was better; returns what is to be said after `PATIENCE` that were not.

    What came before is read from metrics.jsonl, whose first value is that of the student as it began, and from `run/best`, which a run that
    is resumed from an earlier checkpoint keeps. A value that is not finite is never the best. In the first `warmup` iterations the student
    is not trained yet.
    """
    if now.iteration <= warmup:
        return []
    best, folder = read_best(run, now.measured), run / BEST
    if finite(now.value) and (best is None or now.value < best.value):
        write(folder)
        write_json(folder / BEST_FILE, asdict(now))
    values = zip(*series(read_metrics(run / "metrics.jsonl"), now.measured), strict=True)
    past = [(i, v) for i, v in values if i < now.iteration and (i == 0 or i > warmup)]
    if not past:
        return []
    iteration, value = min(past, key=lambda p: p[1])
    since = sum(i > iteration for i, _ in past) + 1
    if now.value < value or since % PATIENCE:
        return []
    worse = f"{plural(since, 'preview')} in a row no better than iteration {iteration}'s, {now.measured} {now.value:.4g} against {value:.4g}"
    if best is None or iteration == 0:
        return [f"{worse}, the student as it began; stop with Ctrl-C and lower train.lr or method.guidance"]
    return [
        f"{worse}; {folder} has the student of iteration {best.iteration}: stop with Ctrl-C, or go on and take it later"
    ]
