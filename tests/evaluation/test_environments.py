"""Scores of other processes: asked by files, and made by one command."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.evaluation.environments import ENVIRONMENTS, PLACE, EnvironmentScorer, environment_scorer, install
from fewstep.evaluation.images import Roots
from fewstep.evaluation.measure import FeatureExtractor
from fewstep.evaluation.scorer import Extra
from fewstep.report.video import write_mp4

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
        environment_scorer("hpsv3", write_mp4)
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
    assert len(environment_scorer("hpsv3", write_mp4).weights["environments/hpsv3/packages.txt"]) == 64
    with pytest.raises(
        ValueError, match=r"^--install: got nothing; choose one of imagereward, hpsv3, vqascore, vbench, lpips$"
    ):
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


# VBench and torch as its environment has them, without networks: a clip's number is the size of its file.
PACKAGES = {
    "torch/__init__.py": """
class hub:
    load = None
class cuda:
    is_available = staticmethod(lambda: False)
device = str
""",
    "vbench/__init__.py": """
import importlib, json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.out = device, output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, mode="vbench_standard"):
        assert mode == "custom_input" and self.device == "cpu"
        (dimension,) = dimension_list
        names = sorted(os.listdir(videos_path), reverse=True)
        found = importlib.import_module("vbench." + dimension).compute(videos_path, names)
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as file:
            json.dump({dimension: [0.0, found]}, file)
""",
    "vbench/imaging_quality.py": """
import os
loaded = []
def MUSIQ(pretrained_model_path):
    loaded.append(pretrained_model_path)
    return lambda path: 100.0 * os.path.getsize(path)
def compute(folder, names):
    model = MUSIQ(pretrained_model_path="x")
    assert len(loaded) == 1
    paths = [os.path.join(folder, name) for name in names]
    return [{"video_path": path, "video_results": model(path)} for path in paths]
""",
}


def test_vbench_is_asked_for_each_clip_with_networks_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sizes: list[int] = []

    def write(path: Path, clip: Any) -> None:
        assert path.suffix == ".mp4" and clip.shape == (5, 3, 8, 8)
        sizes.append(10 * len(sizes) + 3)
        path.write_bytes(bytes(sizes[-1]))

    code = ENVIRONMENTS["vbench_imaging_quality"].code
    scorer = EnvironmentScorer("vbench_imaging_quality", Path(sys.executable), code, write_clip=write)
    try:
        assert scorer.score(torch.zeros(2, 5, 3, 8, 8), ["a", "b"]).tolist() == [3.0, 13.0]
        assert scorer.score(torch.zeros(1, 5, 3, 8, 8), ["c"]).tolist() == [23.0]
    finally:
        scorer.close()


def test_clips_are_scored_whole_and_images_are_refused() -> None:
    class Frames:
        key, weights, clips = "vbench_dynamic_degree", dict[str, str](), True

        def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return images.flatten(1).sum(1) * 0 + images.shape[1]

        def close(self) -> None:
            pass

    gauge = FeatureExtractor(Roots(), colours=False, extra=Extra((Frames(),)))
    clips = torch.rand((2, 7, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert gauge.draw(lambda prompts, seeds: clips, ["a", "b"], [0, 1], "x").scores.tolist() == [[7.0], [7.0]]
    with pytest.raises(ValueError, match=r"^--metrics vbench_dynamic_degree: is of videos, this model makes images; "):
        gauge.draw(lambda prompts, seeds: clips[:, 0], ["a", "b"], [0, 1], "x")
