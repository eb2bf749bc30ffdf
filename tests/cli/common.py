"""The command line in this process, and the recipe of a five-iteration run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from fewstep.cli import main

RECIPE: dict[str, Any] = {
    "kind": "distill",
    "name": "tiny",
    "teacher": "",
    "prompts": {"source": ""},
    "method": {"steps": 4, "guidance": 2.0, "warmup": 1},
    "roles": {"rank": 2},
    "train": {"iterations": 5, "batch": 4, "lr": 1.0e-3, "fake_lr": 1.0e-2, "checkpoint_every": 2},
    "preview": {"every": 5, "prompts": ["red cat", "blue dog"], "teacher_steps": 3},
}
COMMANDS = (
    "distill",
    "plan",
    "sample",
    "evaluate",
    "compare",
    "study",
    "export",
    "push",
    "inspect",
    "report",
    "doctor",
    "studio",
    "train-teacher",
)


def written(teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe and its prompts in this folder, which is worked in from here on."""
    monkeypatch.chdir(folder)
    (folder / "prompts.txt").write_text("red cat\nblue dog\n\nred cat\n")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "teacher": str(teacher), "prompts": {"source": "prompts.txt"}}))
    return path


def fewstep(monkeypatch: pytest.MonkeyPatch, *arguments: object, look: bool = False) -> int:
    """Run the command line in this process, and return its exit code.

    With `look` the checks before a training run too, which take seconds.
    """
    if not look:
        for name in ("look_before", "look_in_dry_run"):
            monkeypatch.setattr(f"fewstep.cli.distill.{name}", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["fewstep", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.run()
    return int(left.value.code or 0)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake prints."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def as_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(i)).permute(2, 0, 1) / 255 for i in images])


def read_report(run: Path | str) -> str:
    """A run's report, its commands without the marks around their words."""
    return re.sub("</?span>", "", (Path(run) / "report.html").read_text())
