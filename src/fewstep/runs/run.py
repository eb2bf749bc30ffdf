"""A run in Python: training, monitoring, log, student and report."""

import sys
import time
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_json
from ..backbones.base import Backbone
from ..backbones.parts import DiffusersBackbone
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..methods.method import Method
from ..methods.metrics import filled, metric_names
from ..notebook import Board
from ..processes import this_process
from ..report.images import save_images
from ..report.run import IMAGES as IMAGES_FILE
from ..report.run import render_run
from ..roles.roles import Roles
from ..student.folder import holds_student, read_card
from ..student.student import Origin
from ..training import loop
from ..training.loop import TrainConfig
from ..training.settings import begun, settings_of
from ..words import python_words
from .metrics_log import MetricsLog
from .preview import Drawing, Preview
from .record import hardware, versions
from .step import Step
from .watch import IMAGES, DistillationWarning, Watch, Watcher, affordable

FINAL = "final"


@dataclass(frozen=True)
class Run:
    """The parts of a run.

    `teacher` is the teacher as passed; `roles` are on modules of their own.
    """

    teacher: Backbone
    roles: Roles
    method: Method
    data: Embeddings
    config: TrainConfig
    origin: Origin
    folder: Path | None
    watch: Watch | None
    real: ImageData | None = None
    paths: Trajectories | None = None


def steps_of(run: Run) -> Generator[Step, None, None]:
    """Train, and yield every iteration with its warnings.

    Before the last iteration is yielded, `folder/final` holds the student and `folder/report.html` the
    report.
    """
    folder, method, roles, config = run.folder, run.method, run.roles, run.config
    processes = this_process().num_processes
    batches = config.on(processes).accumulate * config.groups(processes)
    settings = settings_of(roles, method, run.data, config, batches, run.real, run.paths)
    done = 0 if folder is None else begun(folder, settings)  # before the teacher is called
    watch = run.watch if done < config.iterations else None
    names, preview = metric_names(method, roles), _preview(run, watch)
    watcher, log = Watcher(watch, roles, method, run.data, config, preview), MetricsLog(None, 0)
    recent, told = list[float](), set[str]()
    began = 0.0 if run.paths is None else run.paths.seconds
    training = loop.distill(roles, method, run.data, config, folder, run.real, run.paths)
    try:
        for i, step in enumerate(training):
            again = step.seconds == 0.0 and step.iteration >= config.iterations
            if i == 0 and folder is not None:
                log = _begin(run, folder, settings, step.iteration if again else step.iteration - 1)
                log.seconds = log.seconds or began
            found: list[str] = []
            if not again:
                log.add(step)
                found, numbers = watcher.seen(roles, step.iteration, step.metrics)
                if found or numbers:
                    log.note(
                        step.iteration, ({"warnings": found} if found else {}) | ({"watch": numbers} if numbers else {})
                    )
            elif step.iteration > config.iterations:
                found = [
                    f"LONGER: {folder} has {step.iteration} iterations already, "
                    f"train.iterations is {config.iterations}; this is its last step"
                ]
            recent = [*recent[-19:], step.seconds]
            origin = replace(run.origin, iterations=step.iteration, seconds=log.seconds)
            left = sum(recent) / len(recent) * max(0, config.iterations - step.iteration)
            said = tuple(python_words(text) for text in found)
            whole = Step(
                step.iteration,
                filled(step.metrics, names),
                step.seconds,
                roles,
                method,
                said,
                left,
                None if preview is None else preview.image,
                teacher=run.teacher,
                origin=origin,
            )
            if folder is not None and step.iteration >= config.iterations:
                _finish(run, folder, whole, preview)
            _tell(step.iteration, said, told)
            yield whole
    finally:
        training.close()


def shown(steps: Generator[Step, None, None], run: Run) -> Generator[Step, None, None]:
    """Yield the steps of a run, and show them in a notebook.

    One output has a bar with losses and time left, and the newest preview below.
    """
    board: Board | None = None
    with closing(steps):
        for step in steps:
            board = board or Board(run.method.name, run.config.iterations, step.iteration - 1)
            losses = "  ".join(f"{k} {v:.3g}" for k, v in step.metrics.items() if k.endswith("_loss") and v == v)
            board.show(min(step.iteration, board.total), losses, step.seconds_left, step.image)
            yield step


def _preview(run: Run, watch: Watch | None) -> Preview | None:
    """Return the previews of a pipeline's run.

    None for other networks, and for a run too short for previews.
    """
    if watch is None or not isinstance(run.teacher, DiffusersBackbone):
        return None
    count = affordable(watch, run.method, run.data.null, run.config, IMAGES, IMAGES)
    if not count:
        return None
    of = torch.arange(count) % run.data.count
    shown = run.data.take(of, run.data.key)
    return Preview(
        Drawing(run.method, run.config.batch, watch.teacher_steps, watch.seed, run.config.precision),
        run.roles.backbone,
        shown,
        run.folder,
    )


def _begin(run: Run, folder: Path, settings: dict[str, Any], start: int) -> MetricsLog:
    """Write `run.json` and open the log.

    Only after the checkpoint has been found to be of this run.
    """
    write_json(
        folder / "run.json",
        {
            "title": folder.resolve().name,
            "recipe": {**settings, "iterations": run.config.iterations},
            "base": run.origin.base,
            "base_hash": run.origin.base_hash,
            "seed": run.config.seed,
            "hardware": hardware(),
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "next": next_lines(run, folder),
        },
    )
    return MetricsLog(folder / "metrics.jsonl", start)


def next_lines(run: Run, folder: Path) -> list[list[str]]:
    """Return Python lines that use the student, each with a title."""
    final = str(folder / FINAL)
    base = "" if isinstance(run.teacher, DiffusersBackbone) else ", base=teacher"
    measured = "student, prompts, real=..." if run.data.null else "student, real=..."
    return [
        ["Load the student", f"student = fewstep.load_student({final!r}{base})"],
        ["Sample from it", "samples = fewstep.sample(student, prompts)"],
        ["Measure it next to its teacher", f"fewstep.evaluate({measured})" if base else f"fewstep evaluate {folder}"],
        [
            "Initialize another training from it",
            (
                "fewstep.distill(teacher, method, prompts, "
                f"train=fewstep.TrainConfig(iterations=...), init_from={final!r})"
            ),
        ],
    ]


def _finish(run: Run, folder: Path, step: Step, preview: Preview | None) -> None:
    """Write the student, the report's images and the report.

    Student and images are not written again where they are there already.
    """
    final = folder / FINAL
    if not (holds_student(final) and read_card(final).iterations == step.iteration):
        step.save(final)
        if preview is not None:
            with run.roles.averaged():
                save_images(folder / IMAGES_FILE, preview.compare(run.roles, run.method))
    render_run(folder)


def _tell(iteration: int, said: tuple[str, ...], told: set[str]) -> None:
    """Warn once for each kind of warning.

    The warnings are Python's own, at the line of the code that iterates.
    """
    level, frame = 1, sys._getframe()
    package = str(Path(__file__).resolve().parent.parent)
    while frame is not None and str(Path(frame.f_code.co_filename).resolve()).startswith(package):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    for text in said:
        kind = [text.partition(":")[0], *(word for word in text.split() if "_" in word)][
            : 2 if text.startswith(("LOSS", "GAP")) else 1
        ]
        if (named := " ".join(kind)) not in told:
            told.add(named)
            warnings.warn(f"iteration {iteration}: {text}", DistillationWarning, stacklevel=level)
