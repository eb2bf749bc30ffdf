"""A report made again from the files of a run folder."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import read_json
from .html import Report, write_report
from .live import read_metrics
from .pictures import Pictures, load_pictures
from .summary import Cost, headlines

PICTURES = "pictures.safetensors"
SHAPE = "trajectories.json"  # what `trajp.analysis` says of the teacher's trajectories
SHOWN_SAMPLES = 3


def render_run(run: Path) -> Path:
    """Write `run/report.html` from whatever the folder holds by now; returns its path.

    Reads run.json (`title`, `recipe`, `versions`, `hardware`, `command`, all optional), metrics.jsonl, final/eval.json,
    samples/*.png and pictures.safetensors. Raises ValueError where the folder is no run or a file is damaged.
    """
    if not (run / "run.json").exists():
        lacks = "run.json" if run.is_dir() else "such folder"
        raise ValueError(f"run {run}: there is no {lacks}, allowed are folders that `fewstep distill RECIPE` made; run that first")
    return write_report(run / "report.html", read_run(run))


def read_run(run: Path) -> Report:
    """The report of a run folder; parts whose files are not there yet are empty."""
    about, evaluation = _read_json(run / "run.json"), _read_json(run / "final" / "eval.json")
    metrics = read_metrics(run / "metrics.jsonl")
    rows = evaluation.get("rows", [])
    seconds = [m["seconds"] for m in metrics if "seconds" in m]
    cost = Cost(seconds[-1], metrics[-1]["iteration"], about.get("hardware", "")) if seconds else None
    pictures = load_pictures(run / PICTURES) if (run / PICTURES).exists() else Pictures()
    go_on = [("Go on where it stopped", about["command"])] if "command" in about else []
    return Report(
        title=about.get("title", run.resolve().name),
        summary=headlines(rows, cost),
        rows=rows,
        protocol=evaluation.get("protocol", ""),
        pictures=pictures,
        samples=[(int(p.stem.rpartition("_")[2]), p.read_bytes()) for p in _spread(sorted((run / "samples").glob("step_*[0-9].png")))],
        metrics=metrics,
        cost=cost,
        warnings=[f"Iteration {m['iteration']:,}: {text}" for m in metrics for text in m.get("warnings", ())],
        trajectories=_read_json(run / SHAPE),
        recipe=about.get("recipe", {}),
        next_commands=[(what, line) for what, line in about["next"]]
        if "next" in about
        else next_commands(run, pictures.prompts)
        if (run / "final").is_dir()
        else go_on,
        versions={**about.get("versions", {}), **evaluation.get("versions", {})},
    )


def next_commands(run: Path, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """What one does with the student of this folder, as commands to copy. Models that take no prompt have empty ones."""
    student = shlex.quote(str(run))
    asked = next((f" -p {shlex.quote(p)}" for p in prompts if p), "" if prompts else " -p 'a prompt of your own'")
    out = shlex.quote(str(run / "export"))
    return [
        ("Draw a prompt of your own, the teacher beside the student", f"fewstep sample {student}{asked} --compare"),
        ("Measure it under the full protocol", f"fewstep evaluate {student}"),
        ("Write it for diffusers and ComfyUI; each file is loaded again and compared", f"fewstep export {student} {out}"),
        ("Distil a pipeline of your own", "fewstep distill tdm4 --teacher FOLDER_OR_HUB_ID --prompts prompts.txt --out runs/mine"),
    ]


def _spread(paths: Sequence[Path]) -> list[Path]:
    """At most three of them: the first, the middle one and the last."""
    if len(paths) <= SHOWN_SAMPLES:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (SHOWN_SAMPLES - 1))] for i in range(SHOWN_SAMPLES)]


def _read_json(path: Path) -> Mapping[str, Any]:
    return read_json(path, "delete it and run the command that made it again") if path.exists() else {}
