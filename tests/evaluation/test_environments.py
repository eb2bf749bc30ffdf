"""Scores of other processes: asked by files, and made by one command."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch

from fewstep.evaluation.dpg import URL as DPG_URL
from fewstep.evaluation.dpg import Question, share_right
from fewstep.evaluation.environments import (
    ENVIRONMENTS,
    PLACE,
    EnvironmentScorer,
    environment_scorer,
    install,
    python_of,
)
from fewstep.evaluation.images import Roots
from fewstep.evaluation.inception import FILE as INCEPTION
from fewstep.evaluation.measure import FeatureExtractor
from fewstep.evaluation.scorer import Extra, spelled
from fewstep.evaluation.weights import PLACE as WEIGHTS
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
        ValueError,
        match=r"^--install: got nothing; choose one of imagereward, hpsv3, vqascore, dpg, vbench, "
        r"vbench_objects, lpips, inception$",
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


# VBench and torch as its environment has them, without networks: a clip's number is the size of its file, or how its
# name or prompt begins.
PACKAGES = {
    "torch/__init__.py": """
class hub:
    load = None
class cuda:
    is_available = staticmethod(lambda: False)
device = str
load = len
def no_grad():
    import contextlib
    return contextlib.nullcontext()
""",
    "vbench/__init__.py": """
import importlib, json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.out = device, output_path
    def build_full_info_json(self, videos_path, name, dimension_list, prompt_list=[], mode="vbench_standard"):
        raise AssertionError("looks for clips by their names")
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, mode="vbench_standard"):
        assert self.device == "cpu"
        (dimension,) = dimension_list
        with open(self.build_full_info_json(videos_path, name, dimension_list)) as file:
            asked = json.load(file)
        assert all(one["dimension"] == dimension_list and len(one["video_list"]) == 1 for one in asked)
        found = importlib.import_module("vbench." + dimension).compute(asked[::-1])
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as file:
            json.dump({dimension: [0.0, found]}, file)
""",
    "vbench/VBench_full_info.json": """[
{"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
{"prompt_en": "a red car", "dimension": ["imaging_quality"]},
{"prompt_en": "A person is riding a bike", "dimension": ["human_action", "imaging_quality"]}]
""",
    "vbench/imaging_quality.py": """
import os
loaded = []
def MUSIQ(pretrained_model_path):
    loaded.append(pretrained_model_path)
    return lambda path: 100.0 * os.path.getsize(path)
def compute(asked):
    model = MUSIQ(pretrained_model_path="x")
    assert len(loaded) == 1
    paths = [one["video_list"][0] for one in asked]
    return [{"video_path": path, "video_results": model(path)} for path in paths]
""",
    "vbench/human_action.py": """
def compute(asked):
    paths = [one["video_list"][0] for one in asked]
    named = [path.split("/")[-1].lower().split("-")[0].split("person is ")[-1].split("_")[0] for path in paths]
    return [{"video_path": p, "video_results": name == "riding a bike"} for p, name in zip(paths, named)]
""",
    "vbench/color.py": """
import os
loaded = []
class DenseCaptioning:
    def __init__(self, device):
        loaded.append(device)
    def initialize_model(self, weights):
        loaded.append(weights)
    def initialize_model_det(self, weights):
        raise AssertionError("is of other dimensions")
def compute(asked):
    DenseCaptioning("cpu").initialize_model("w")
    assert loaded == ["cpu", "w"], loaded
    assert all(one["auxiliary_info"]["color"] == {"color": "red"} for one in asked)
    seen = [one["video_list"][0] for one in asked if os.path.getsize(one["video_list"][0]) > 5]
    return 1 / len(seen) and [{"video_path": path, "video_results": 0.5} for path in seen]
""",
}


@pytest.mark.parametrize(
    ("dimension", "prompts", "expected"),
    [
        ("imaging_quality", ("a", "b", "c"), [3.0, 13.0, 23.0]),
        ("human_action", ("A person is riding a bike", "A person is riding a bike", "a red car"), [1.0, 1.0, None]),
        ("color", ("a red car", "a red car", "a red car"), [None, 0.5, 0.5]),  # none is seen in the first
        ("color", ("a", "b", "a red car"), [None, None, 0.5]),
    ],
)
def test_vbench_is_asked_for_each_clip_with_networks_loaded_once(
    dimension: str, prompts: tuple[str, ...], expected: list[float | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sizes: list[int] = []

    def write(path: Path, clip: Any) -> None:
        assert path.suffix == ".mp4" and clip.shape == (5, 3, 8, 8)
        sizes.append(10 * len(sizes) + 3)
        path.write_bytes(bytes(sizes[-1]))

    key = f"vbench_{dimension}"
    scorer = EnvironmentScorer(key, Path(sys.executable), ENVIRONMENTS[key].code, write_clip=write)
    try:
        first = scorer.score(torch.zeros(2, 5, 3, 8, 8), prompts[:2]).tolist()
        second = scorer.score(torch.zeros(1, 5, 3, 8, 8), prompts[2:]).tolist()
    finally:
        scorer.close()
    assert [None if number != number else number for number in first + second] == expected


def test_vbenchs_dimensions_are_all_there() -> None:
    of = {key: one for key, one in ENVIRONMENTS.items() if key.startswith("vbench_")}
    assert len(of) == 16 and set(of) == {*spelled(["vbench", "vbench_actions", "vbench_objects"])}
    assert {one.folder for one in of.values()} == {"vbench", "vbench_objects"}
    assert {one.of for one in of.values()} == {"", "vbench"}
    assert [one.key for one in of.values() if one.built] == spelled(["vbench_objects"])


QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad,tuple,question_natural_language
1,a red dog,,1,0,entity,"entity - whole (dog)",Is there a dog?
1,a red dog,,2,1,attribute,"attribute - color (dog, red)",Is the dog red?
1,a red dog,,3,"1,2",other,"other",Is there one dog?
2,"two
lines, and  a comma",,1,0,entity,"e",Is there a line?
"""


def test_questions_count_with_all_they_build_on() -> None:
    """The rule of DPG-Bench: in order, so that a question that was lost loses those that build on it."""
    chain = [Question(1, "a"), Question(2, "b", (1,)), Question(3, "c", (2,)), Question(4, "d")]
    assert share_right(chain, [1, 1, 1, 1]) == 1
    assert share_right(chain, [0, 1, 1, 1]) == 0.25
    assert share_right(chain, [1, 0, 1, 0]) == 0.25
    assert share_right([Question(1, "a"), Question(2, "b"), Question(3, "c", (1, 2))], [1, 0, 1]) == pytest.approx(
        1 / 3
    )


def test_dpgs_questions_are_asked_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image once, with all questions of its prompt; a stand-in says yes of red images, and of dogs."""
    monkeypatch.setenv(PLACE, str(tmp_path / "environments"))
    monkeypatch.setenv(WEIGHTS, str(tmp_path))
    mplug = """
from types import SimpleNamespace as Namespace
class Words(str):
    def to(self, device):
        return self
class Model:
    config = Namespace(image_res=4)
    def eval(self):
        return self
    def to(self, device):
        assert device == "cpu"
        return self
    def __call__(self, image, words, train):
        red = image.getpixel((0, 0))[0] > 100
        return [["yes" if "dog" in words and ("red" not in words or red) else "no"]], None
class MPlug:
    @staticmethod
    def from_pretrained(folder, task):
        assert folder.startswith("here/damo/mplug") and task == "visual-question-answering"
        Model.tokenizer = staticmethod(tokenizer)
        return Model()
def tokenizer(question, **options):
    assert question == question.lower() and options["max_length"] == 25
    return Words(question)
tokenizer.decode = lambda ids, skip_special_tokens: ids
"""
    transforms = """
class InterpolationMode:
    BICUBIC = 3
class Seen:
    def __init__(self, image):
        self.getpixel = image.getpixel
    def __getitem__(self, index):
        return self
    def to(self, device):
        return self
def Compose(parts):
    assert parts == [(4, 4), "tensor", 3]
    return Seen
def Resize(size, interpolation):
    assert interpolation == 3
    return size
def ToTensor():
    return "tensor"
def Normalize(mean, std):
    return len(mean)
"""
    packages = tmp_path / "packages"
    for name, text in {
        "modelscope/__init__.py": "def snapshot_download(name):\n    return 'here/' + name\n",
        "modelscope/models/__init__.py": "",
        "modelscope/models/multi_modal/__init__.py": "",
        "modelscope/models/multi_modal/mplug.py": mplug,
        "torchvision/__init__.py": "",
        "torchvision/transforms.py": transforms,
        "torch.py": PACKAGES["torch/__init__.py"],
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(Path(PIL.__file__).parents[1])]))
    python = python_of("dpg")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    with pytest.raises(ValueError, match=r"^--metrics dpg: it needs .* run: fewstep evaluate --install dpg$"):
        environment_scorer("dpg", write_mp4)
    (python.parents[1] / "packages.txt").write_text("modelscope==1.40.2\n")
    with pytest.raises(ValueError, match=r"^questions .*dpg_bench\.csv: cannot be used .*; put https://.* there$"):
        environment_scorer("dpg", write_mp4)
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "dpg_bench.csv").write_text(QUESTIONS, encoding="utf-8")
    scorer = environment_scorer("dpg", write_mp4)
    images = torch.zeros(3, 3, 8, 8)
    images[1:, 0] = 1
    try:
        prompts = ["a red dog", "a red dog", "two\nlines, and  a comma"]
        assert scorer.score(images, prompts).tolist() == pytest.approx([1 / 3, 1, 0])
        with pytest.raises(ValueError, match=r"^--metrics dpg: its questions have none of 'a cat'; put https://"):
            scorer.score(images[:1], ["a cat"])
    finally:
        scorer.close()
    assert scorer.of == "dpg" and set(scorer.weights) == {"dpg/dpg_bench.csv", "environments/dpg/packages.txt"}


def test_what_is_built_or_fetched_comes_after_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "weights"))
    called: list[list[str]] = []

    def run(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        called.append(list(command[1:]))
        (tmp_path / "vbench_objects").mkdir(exist_ok=True)
        (tmp_path / "dpg").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    install("vbench_objects")
    assert "vbench==0.1.5" in called[1] and called[2][4] == "--no-build-isolation" and "detectron2" in called[2][5]
    called.clear()
    install("dpg")
    assert DPG_URL in called[2][1] and called[2][2:] == [str(tmp_path / "weights" / "dpg" / "dpg_bench.csv")]
    assert (tmp_path / "weights" / "dpg").is_dir()
    called.clear()
    (tmp_path / "inception").mkdir()
    assert install("inception") == tmp_path / "weights" / INCEPTION and len(called) == 2
    assert "urlretrieve('https://" in called[1][1]


def test_clips_are_scored_whole_and_images_are_refused() -> None:
    class Frames:
        key, weights, clips, of = "vbench_dynamic_degree", dict[str, str](), True, ""

        def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return images.flatten(1).sum(1) * 0 + images.shape[1]

        def close(self) -> None:
            pass

    gauge = FeatureExtractor(Roots(), colours=False, extra=Extra((Frames(),)))
    clips = torch.rand((2, 7, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert gauge.draw(lambda prompts, seeds: clips, ["a", "b"], [0, 1], "x").scores.tolist() == [[7.0], [7.0]]
    with pytest.raises(ValueError, match=r"^--metrics vbench_dynamic_degree: is of videos, this model makes images; "):
        gauge.draw(lambda prompts, seeds: clips[:, 0], ["a", "b"], [0, 1], "x")
