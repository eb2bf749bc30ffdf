"""Scores of other processes: asked by files, and made by one command."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.evaluation.environments import ENVIRONMENTS, PLACE, EnvironmentScorer, environment_scorer, install

# The mean of red and the length of the prompt, in place of a model; it prints, as packages do.
FAKE = """
from PIL import Image, ImageStat
print("loading the model ...")
def score(paths, prompts):
    print("scoring")
    return [ImageStat.Stat(Image.open(p)).mean[0] + 1000 * len(t) for p, t in zip(paths, prompts)]
"""


def test_images_go_by_files_and_numbers_come_back() -> None:
    scorer = EnvironmentScorer("hpsv3", Path(sys.executable), FAKE)
    images = torch.zeros(3, 3, 8, 8)
    images[:, 0] = torch.tensor([0.0, 51 / 255, 1.0])[:, None, None]
    try:
        assert scorer.score(images, ["a", "bb", "é"]).tolist() == [1000.0, 2051.0, 1255.0]
        first = scorer.process
        assert scorer.score(images[:1], ["abc"]).tolist() == [3000.0]
        assert scorer.process is first  # the model is loaded once
    finally:
        scorer.close()
    assert first is not None and first.returncode == 0 and scorer.process is None


def test_a_process_that_ends_is_said_in_one_line() -> None:
    scorer = EnvironmentScorer("hpsv3", Path(sys.executable), "raise SystemExit(1)")
    with pytest.raises(ValueError, match=r"^--metrics hpsv3: its process ended without an answer.*--install hpsv3$"):
        scorer.score(torch.zeros(1, 3, 8, 8), ["a"])


def test_an_environment_is_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that are run, without running them: a test needs no network."""
    monkeypatch.setenv(PLACE, str(tmp_path))
    with pytest.raises(ValueError, match=r"^--metrics hpsv3: it needs .* run: fewstep evaluate --install hpsv3$"):
        environment_scorer("hpsv3")
    called: list[list[str]] = []

    def run(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        called.append(list(command))
        python = tmp_path / "hpsv3" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return subprocess.CompletedProcess(command, 0, "hpsv3==1.0.0\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert install("hpsv3") == tmp_path / "hpsv3"
    assert called[0][1:3] == ["-m", "venv"] and "hpsv3==1.0.0" in called[1]
    assert len(environment_scorer("hpsv3").weights["environments/hpsv3/packages.txt"]) == 64
    with pytest.raises(ValueError, match=r"^--install: got nothing; choose one of imagereward, hpsv3, vqascore$"):
        install("nothing")
    failed = subprocess.CompletedProcess([], 1, "", "a\nno network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^--install hpsv3: .* venv failed \(no network\); look at the network$"):
        install("hpsv3")


def test_every_environment_is_a_metric() -> None:
    from fewstep.evaluation.metrics import METRICS

    assert set(ENVIRONMENTS) < set(METRICS)
    for environment in ENVIRONMENTS.values():
        compile(environment.code, environment.key, "exec")
