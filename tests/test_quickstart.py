"""The Python of README.md and docs/quickstart.md, run as written with fewer iterations."""

import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep

from .project import ROOT


def blocks(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    found = re.findall(
        r"^ *```python\n(.*?)^ *```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(block) for block in found]


class MyNetwork(nn.Module):
    """A network of images that predicts noise: the ideal one for white noise as data, and a little more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.dirac_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bars = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[t.long()]
        return self.layer(x) * (1 - bars).sqrt()[:, None, None, None]


def run(code: str, names: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fewstep.DistillationWarning)
        exec(compile(code, "page", "exec"), names)


def test_the_quickstart_of_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/quickstart.md")[-1]
    few = code.replace("iterations=1000, batch=32", "iterations=4, batch=2").replace("% 100", "% 2")
    few = few.replace("guidance=1.0", "guidance=1.0, warmup=1")
    assert [few.count(part) for part in ("iterations=4, batch=2", "% 2", "warmup=1")] == [1, 1, 1]
    names: dict[str, Any] = {
        "MyNetwork": MyNetwork,
        "images": torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }
    run(few, names)
    assert names["samples"].shape == (16, 3, 32, 32) and names["samples"].isfinite().all()
    assert names["step"].iteration == 4
    assert names["student"].card.steps == (4,)


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second block makes the student that its first one loads."""
    monkeypatch.chdir(tmp_path)
    use, train = blocks("README.md")
    few = train.replace("iterations=400", "iterations=1, batch=2").replace("TDM(steps=4)", "TDM(steps=4, warmup=0)")
    assert "iterations=1, batch=2" in few and "warmup=0" in few
    names: dict[str, Any] = {"fewstep": fewstep, "prompts": ["rocket", "cat"]}
    run(few, names)
    assert names["step"].iteration == 1
    run(use.replace("runs/demo", "runs/mine"), names)
    assert names["image"].size == (64, 64)
