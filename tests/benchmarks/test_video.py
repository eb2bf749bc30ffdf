"""`benchmarks/video.py` from end to end on clips made here: a handful of iterations, no network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.training.fit import FitConfig
from fewstep.zoo.clip_data import Clips
from fewstep.zoo.emoji_data import Emoji


def sliding(count: int) -> Clips:
    """Squares of several colours that slide to the right, each faster than the one before."""
    emoji, frames = [], []
    for i in range(count):
        x = torch.full((24, 3, 16, 16), 255, dtype=torch.uint8)
        for f in range(24):
            left = (i * f // 8) % 8
            x[f, :, 4:12, left : left + 8] = torch.tensor([40 * i, 100, 200 - 30 * i], dtype=torch.uint8)[:, None, None]
        emoji.append(Emoji(f"square {i}", f"square {i}", "", f"{i}.png", False))
        frames.append(x)
    return Clips(emoji, frames)


@pytest.mark.slow
def test_clips_become_a_teacher_a_student_and_a_table(load: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    bench = load("video")
    fit = FitConfig(steps=2, batch=2, lr=1e-3, warmup=1, decay=1, checkpoint_every=1)
    sizes = {"size": 16, "variants": 2, "channels": (8, 8, 8), "latent": 4, "width": 32, "heads": 2, "layers": 1}
    lengths = {"iterations": 6, "batch": 2, "steps": 2, "count": 6, "components": 3}
    muon = replace(fit, optimizer="muon")
    plan = replace(bench["PLAN"], codec=fit, denoiser=muon, text=(16, 1, 2), **sizes, **lengths)
    clips, to = sliding(6), tmp_path / "to"
    to.mkdir()
    rows = {r["model"]: r for r in bench["chain"](plan, clips, tmp_path / "run", to)}
    assert list(rows) == ["real", "codec", "still", "teacher", "teacher-again", "teacher-4", "student"]
    assert rows["real"]["motion_of_each"][0] == 0  # it does not slide
    assert rows["real"]["motion"] > 1
    assert rows["real"]["like_real"] == rows["teacher"]["like_teacher"] == rows["teacher"]["of_teacher"] == 1
    assert rows["still"]["motion"] == rows["still"]["moves"] == 0 < rows["codec"]["motion"]
    assert rows["real"]["fd_looks"] < rows["teacher"]["fd_looks"]
    written = json.loads((to / "video.json").read_text())
    assert written["rows"] == list(rows.values())
    assert {"clips", "plan", "prompts", "train_seconds"} == written["common"].keys()
    assert (to / "video.md").read_text().count("\n| ") == 2 + len(rows)
    assert Image.open(to / "video.png").width > 4 * 5 * 16
    assert (tmp_path / "run" / "sample" / "clips-0.mp4").is_file()
    trained = sorted((f, f.stat().st_mtime_ns) for f in (tmp_path / "run").rglob("*") if f.is_file())
    assert list(bench["chain"](plan, clips, tmp_path / "run", to)) == list(rows.values())
    again = sorted((f, f.stat().st_mtime_ns) for f in (tmp_path / "run").rglob("*") if f.is_file())
    assert again == trained
