"""A report made again from the files of a run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..names import quoted
from ..reading import object_in, reading, require_regular
from ..student.folder import holds_student, read_card
from ..typed import typed
from .grids import require_png
from .html import Report, render
from .images import Images, load_images
from .kinds import About, BestPreview, Evaluation, Row, Shape
from .live import read_metrics
from .summary import Cost, headlines
from .table import sentences

IMAGES = "images.safetensors"
REPORT = "report.html"
SHAPE = "trajectories.json"  # the shape of the trajectories, see `report.trajectories`
BEST, BEST_FILE = "best", "preview.json"  # the student of the best preview, and which preview
SHOWN_SAMPLES = 3
STEP = re.compile(r"step_[0-9]{1,18}\.png")
CURE = "delete it and run the command that made it again"


def render_run(run: Path) -> Path:
    """Write `run/report.html` from whatever the folder holds by now.

    Reads run.json (`title`, `recipe`, `versions`, `hardware`, `command`, `next`, all optional),
    metrics.jsonl, final/eval.json, final/fewstep.json, best/preview.json, trajectories.json, samples/*.png
    and images.safetensors. Returns the report's path.

    Raises ValueError where the folder is no run or a file is damaged.
    """
    if not (run / "run.json").exists():
        lacks = "run.json" if run.is_dir() else "such folder"
        raise ValueError(
            f"run {run}: there is no {lacks}, allowed are folders that `fewstep distill RECIPE` made; run that first"
        )
    with reading(f"run {run}", CURE, "cannot be shown"):
        page = render(read_run(run))
    return write_text(run / REPORT, page)


def read_run(run: Path) -> Report:
    """Read the report of a run's folder.

    Parts whose files are not there yet are empty.
    """
    about, evaluation = _read(run / "run.json", About), read_evaluation(run / "final" / "eval.json")
    metrics = read_metrics(run / "metrics.jsonl")
    rows = evaluation.get("rows", [])
    seconds = [m["seconds"] for m in metrics if "seconds" in m]
    cost = Cost(seconds[-1], metrics[-1]["iteration"], about.get("hardware", "")) if seconds else None
    images = load_images(run / IMAGES) if (run / IMAGES).exists() else Images()
    go_on = [("Go on where it stopped", about["command"])] if "command" in about else []
    return Report(
        title=about.get("title", run.resolve().name),
        made=made(run, about.get("recipe", {}), metrics[-1]["iteration"] if metrics else 0),
        summary=headlines(rows, cost),
        rows=rows,
        protocol=evaluation.get("protocol", ""),
        findings=[found["said"] for found in evaluation.get("findings", [])] if "findings" in evaluation else None,
        paired=sentences(rows, evaluation.get("paired", [])),
        asked=evaluation.get("prompts", {}),
        images=images,
        samples=[(int(p.stem.rpartition("_")[2]), _grid(p)) for p in _spread(_grids(run / "samples"))],
        metrics=metrics,
        cost=cost,
        warnings=[f"Iteration {m['iteration']:,}: {text}" for m in metrics for text in m.get("warnings", ())],
        trajectories=_read(run / SHAPE, Shape),
        recipe=about.get("recipe", {}),
        next_commands=[(what, line) for what, line in about["next"]]
        if "next" in about
        else next_commands(run, images.prompts)
        if (run / "final").is_dir()
        else go_on,
        versions={**about.get("versions", {}), **evaluation.get("versions", {})},
    )


def best_preview(run: Path) -> Mapping[str, Any]:
    """Read which preview's student lies in `run/best`.

    The keys are `iteration`, `value` and what was `measured`. Empty where there is no such student.
    """
    return _read(run / BEST / BEST_FILE, BestPreview)


def made(run: Path, recipe: Mapping[str, Any], iteration: int) -> list[tuple[str, str]]:
    """Return what was made, as (name, value).

    The facts are teacher, method, steps, what was trained, and which file to use. Of a run without a
    student, the facts say what is being made.
    """
    card = read_card(run / "final") if holds_student(run / "final") else None
    method, train = recipe.get("method") or {}, recipe.get("train") or {}
    first = ((recipe.get("warm_start") or {}).get("method") or {}).get("name")
    name = f"{first}-{method.get('name')}" if first else method.get("name")
    steps = card.steps if card else method.get("steps")
    counts = [steps] if isinstance(steps, int) else list(steps or [])
    facts = [
        ("Teacher", card.base if card else recipe.get("teacher")),
        ("Method", card.method if card else name),
        ("Steps", _listed(counts)),
    ]
    if card:
        trained = {"lora": f"LoRA of rank {card.rank}, for strength 1.0", "full": "all weights of the network"}
        each = ", for each step" * card.per_step
        head = f"{each}, and a {card.head} head" if card.head else each
        facts.append(
            (
                "Trained",
                trained.get(card.weights, "nothing but a head") + (head if card.weights != "none" else ""),
            )
        )
        files = sorted(p.name for p in (run / "final").glob("*-lora.safetensors"))
        if card.iterations < iteration:
            facts.append(("Student of", f"iteration {card.iterations:,} of {iteration:,}, the best preview"))
        facts.append(("File to use", f"{run / 'final'}{f', for other programs {files[0]} in it' if files else ''}"))
    elif train.get("iterations"):
        facts.append(("State", f"iteration {iteration:,} of {train['iterations']:,}; there is no student yet"))
    best = best_preview(run)
    if best and int(best["iteration"]) < iteration:
        facts.append(
            (
                "Best preview",
                f"iteration {best['iteration']:,}, kept in {run / BEST} ({best['measured']} {best['value']:.4g})",
            )
        )
    return [(key, str(value)) for key, value in facts if value]


def _listed(counts: Sequence[int]) -> str:
    """List counts as `4`, `4 or 2`, `4, 2 or 1`."""
    words = [str(count) for count in counts]
    return " or ".join(w for w in (", ".join(words[:-1]), *words[-1:]) if w)


def next_commands(run: Path, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Return commands that use the student, each with a title.

    A model that takes no prompts has empty `prompts`.
    """
    student = quoted(str(run))
    asked = next((f" -p {quoted(p)}" for p in prompts if p), "" if prompts else " -p 'a prompt of your own'")
    out = quoted(str(run / "export"))
    return [
        ("Sample a prompt of your own, next to the teacher", f"fewstep sample {student}{asked} --compare"),
        ("Measure it under the full protocol", f"fewstep evaluate {student}"),
        ("Compare it with its teacher, image by image", f"fewstep compare {student}"),
        ("Let people vote without knowing which is which", f"fewstep study {student}"),
        (
            "Write it for diffusers and ComfyUI; each file is loaded again and compared",
            f"fewstep export {student} {out}",
        ),
        (
            "Distil a pipeline of your own",
            "fewstep distill tdm4 --teacher FOLDER_OR_HUB_ID --prompts prompts.txt --out runs/mine",
        ),
    ]


def _spread(paths: Sequence[Path]) -> list[Path]:
    """Return at most three paths: the first, middle and last."""
    if len(paths) <= SHOWN_SAMPLES:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (SHOWN_SAMPLES - 1))] for i in range(SHOWN_SAMPLES)]


def _grids(folder: Path) -> list[Path]:
    """Return the grids of a run's previews, in order.

    Files that others put next to the grids are left alone.
    """
    return sorted(p for p in folder.glob("step_*.png") if STEP.fullmatch(p.name))


def _grid(path: Path) -> bytes:
    """Read the bytes of a PNG image.

    Raises ReadError for a file that is no PNG image.
    """
    with reading(path, CURE):
        return require_png(require_regular(path).read_bytes())


def read_evaluation(path: Path) -> Mapping[str, Any]:
    """Read an evaluation.

    Raises ReadError where a value other than the model's name is no number.
    """
    found = _read(path, Evaluation)
    with reading(path, CURE):
        for row in found.get("rows", []):
            for key, value in row.items():
                if key not in Row.__annotations__:
                    typed(bool | float | None, value, key)
        rows, paired = found.get("rows", []), found.get("paired", [])
        ends = [one["wins_interval"] for one in paired] + [e for row in rows for e in row.get("intervals", {}).values()]
        if any(len(end) != 2 for end in ends):
            raise ValueError("an interval in it has not two ends")
        if any(not 0 <= one[key] < len(rows) for one in paired for key in ("row", "against")):
            raise ValueError("its paired comparisons are of other rows")
    return found


def _read(path: Path, kind: Any) -> Mapping[str, Any]:
    """Read a JSON file of this kind.

    Empty where there is no file. Raises ReadError.
    """
    if not path.exists():
        return {}
    with reading(path, CURE):
        found: Mapping[str, Any] = typed(kind, object_in(path))
    return found
