"""A killed run that is resumed leaves what the straight run leaves.

The kill may come at any moment. Lines, previews and points of the curves are compared.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.atomic import write_json, write_text
from fewstep.cli import distill as module
from fewstep.cli.distill import training
from fewstep.cli.evaluate import Measures
from fewstep.cli.preflight import held
from fewstep.cli.progress import console
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Split, embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs.metrics_log import MetricsLog
from fewstep.runs.preview import Preview
from fewstep.runs.preview import Shown as Seen
from fewstep.runs.recipe import DistillRecipe, recorded
from fewstep.training.loop import Step, distill
from fewstep.training.state import latest_checkpoint, save_checkpoint

from .. import tiny
from ..student.card import CARD
from .common import RECIPE

METHOD = DistributionMatching(steps=2, warmup=1, guidance=Guidance(scale=1.0))
TRAIN = {"iterations": 3, "batch": 2, "lr": 1e-3, "fake_lr": 1e-2, "checkpoint_every": 2}


class Shown(Preview):
    """A preview whose image is a number of the student's weights, and which warns of every one."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def show(self, roles: Roles, iteration: int, method: Any) -> Seen:
        from fewstep.atomic import write_json

        write_json(
            self.run / "samples" / f"step_{iteration:06d}.png", float(sum(t.sum() for t in roles.average.values()))
        )
        return Seen([f"of {iteration}"], {2: 0.5})


def run_once(run: Path) -> None:
    """What the command does between its teacher and its student."""
    recipe = DistillRecipe.model_validate(
        {
            **RECIPE,
            "teacher": "x",
            "method": {"steps": 2, "guidance": 1.0, "warmup": 1},
            "train": TRAIN,
            "preview": {"every": 2},
        }
    )
    backbone = tiny.denoiser()
    with held(run):
        found = latest_checkpoint(run)
        log, preview = MetricsLog(run / "metrics.jsonl", 0 if found is None else found[1]["step"]), Shown(run)

        def resumed(step: Step) -> None:
            module.complete(recipe, step, preview, log, Measures(Split(tuple(tiny.WORDS), ())))

        roles, data = make_roles(backbone, RolesConfig(rank=2)), embed(backbone, tiny.WORDS, run / "embeddings", "tiny")
        training(
            recipe,
            roles,
            distill(roles, METHOD, data, recipe.train, run, resumed=resumed),
            preview,
            log,
            Measures(Split(tuple(tiny.WORDS), ())),
        )


def in_a_child(work: Callable[[], None]) -> int:
    """The exit status of a copy of this process that does the work, or the signal that it died of."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - it must not go on as a test
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(event: int, counted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill this process before its n-th step of writing: a line, a file's or folder's new name, a folder's end."""
    counting = Lock()

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with counting:  # a checkpoint is written by a thread of its own
                with counted.open("ab") as file:
                    file.write(b".")
                if counted.stat().st_size == event:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for owner, name in ((os, "replace"), (MetricsLog, "note"), (module, "measure"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))


def left(run: Path) -> tuple[list[tuple[int, list[str]]], dict[str, str], set[str]]:
    """The log without times, the previews, and the names of all files."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = sorted((r["iteration"], sorted(f"{k}={v}" for k, v in r.items() if k != "seconds")) for r in records)
    images = {p.name: p.read_text(encoding="utf-8") for p in (run / "samples").iterdir()}
    return lines, images, {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_kill_at_any_step_of_writing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def measured(recipe: DistillRecipe, step: Step, log: MetricsLog, prompts: object) -> dict[str, float]:
        log.note(step.iteration, {"quality": {"fd_real": step.iteration}})
        return {"fd_real": step.iteration}

    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(console, "quiet", True)
    run_once(tmp_path / "straight")
    lines, images, files = left(tmp_path / "straight")
    assert [i for i, _ in lines] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3] and sorted(images) == [
        f"step_{i:06d}.png" for i in (0, 2, 3)
    ]
    event, died = 0, -signal.SIGKILL
    while died:
        event += 1
        run = tmp_path / f"killed-{event}"

        def work(run: Path = run, event: int = event) -> None:
            with monkeypatch.context() as patch:
                dying_at(event, tmp_path / f"{event}.count", patch)
                run_once(run)

        died = in_a_child(work)
        assert died in (0, -signal.SIGKILL)
        run_once(run)
        assert left(run) == (lines, images, files), event
        for name in ("student", "average", "optimizer_student"):
            one, other = (
                load_file(r / "checkpoint-000003" / f"{name}.safetensors") for r in (tmp_path / "straight", run)
            )
            assert all(one[n].equal(t) for n, t in other.items())
    assert event > 20


@pytest.mark.parametrize("lost", ["final", "report.html", "report of before", "student of before", ""])
def test_a_first_stage_is_finished_when_nothing_of_it_is_missing(lost: str, tmp_path: Path) -> None:
    """A second stage begins from a complete first stage alone.

    A kill after the last checkpoint leaves no student, no report, or those of a shorter training before.
    """
    recipe = DistillRecipe.model_validate(
        {**RECIPE, "teacher": "x", "method": {"steps": 2, "guidance": 1.0, "warmup": 1}, "train": TRAIN}
    )
    save_checkpoint(tmp_path, 3, {"student": {"x": torch.ones(1)}}, {})
    write_json(tmp_path / "run.json", {"recipe": recorded(recipe)})
    write_json(
        tmp_path / "final" / "fewstep.json", asdict(replace(CARD, iterations=2 if lost == "student of before" else 3))
    )
    write_text(tmp_path / "report.html", "")
    if lost == "report of before":
        os.utime(tmp_path / "report.html", (0, 0))
    elif (tmp_path / lost).is_dir() and lost:
        shutil.rmtree(tmp_path / lost)
    elif lost == "report.html":
        (tmp_path / lost).unlink()
    assert module.finished(tmp_path, recipe) == (lost == "")
