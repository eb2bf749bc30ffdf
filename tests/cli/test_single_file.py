"""A checkpoint in one file as the teacher, from the plan to every file that comes of it."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep as package
from fewstep.api import load_student, load_teacher, sample
from fewstep.backbones.few_step import drawn
from fewstep.backbones.load import absolute, called, fingerprint
from fewstep.student.folder import read_card
from fewstep.training import loop

from .. import single_file
from ..snippets import snippet_of
from .common import error_of, fewstep
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere")

TDM = {"steps": 2, "warmup": 0}
PROMPTS = ["red cat", "blue dog"]


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, tmp_path: Path) -> str:
    """`model.safetensors@configs` in the working folder, the folder that it was made from beside."""
    single_file.save(family, tmp_path)
    return "model.safetensors@configs"


def losses(run: Path) -> torch.Tensor:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = torch.tensor([[r["fake_loss"], r["student_loss"]] for r in records if "student_loss" in r])
    assert len(found) == 3
    return found


def seen(run: Path) -> torch.Tensor:
    """What the snippet of a run's model card draws, executed in the working folder."""
    code = snippet_of(run / "final")
    names: dict[str, Image.Image] = {}
    exec(code.replace("a prompt", "red cat").replace('"final"', f'"{run / "final"}"'), names)
    image = names["image"]
    return torch.tensor(list(image.tobytes())).reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("family", ["sd"], indirect=True)
@pytest.mark.slow
def test_a_file_gives_the_student_that_its_folder_gives(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file gives the student that its diffusers folder gives, to rounding.

    The student is begun, stopped, resumed, sampled, exported and loaded. Its tensors lie otherwise in memory.
    """
    path = recipe(Path("whole"), method=TDM)
    run = ("distill", path, "--teacher", base, "--set", "train.iterations=3", "--out", "one")
    assert fewstep(monkeypatch, *run, "--dry-run") == 0
    assert (
        fewstep(monkeypatch, "sample", base, "-p", "red cat", "--steps", "2", "--guidance", "3", "--out", "teacher.png")
        == 0
    )
    update, asked = loop._update, list[bool]()

    def interrupt(*arguments: Any) -> torch.Tensor:
        if arguments[-1].iteration == 1 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", interrupt)
        assert fewstep(monkeypatch, *run) == 130
    assert fewstep(monkeypatch, *run) == 0
    assert "resuming one at iteration 2 of 3" in capsys.readouterr().out
    assert fewstep(monkeypatch, "distill", path, "--set", "train.iterations=3", "--out", "two") == 0
    torch.testing.assert_close(losses(Path("one")), losses(Path("two")), rtol=1e-4, atol=1e-6)
    cached = [sorted(p.name for p in Path(r, "embeddings").glob("*.safetensors")) for r in ("one", "two")]
    assert cached[0] and cached[0] == cached[1]  # the cache knows encoders by their weights
    card = read_card(Path("one/final"))
    assert (card.base, card.name) == (absolute(base), "model-tdm-2step")
    assert card.base_hash == read_card(Path("two/final")).base_hash == fingerprint(load_teacher("whole").module)
    assert json.loads(Path("one/final/comfyui-workflow.json").read_text())["1"]["inputs"] == {
        "ckpt_name": "model.safetensors"
    }
    own = sample(load_student("one/final"), PROMPTS)
    torch.testing.assert_close(own, sample(load_student("two/final"), PROMPTS), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn(package.load(base, "one/final"), PROMPTS, 2), own, rtol=0, atol=1e-4)
    readme = Path("one/final/README.md").read_text()
    assert 'from_single_file("model.safetensors", config="configs")' in readme and "base_model" not in readme
    assert (seen(Path("one")) - own[0]).abs().max() < 0.02
    assert fewstep(monkeypatch, "sample", "one", "-p", "red cat", "--compare", "--out", "x.png") == 0
    for form in ("kohya", "pipeline"):
        assert fewstep(monkeypatch, "export", "one", f"as-{form}", "--format", form) == 0
    assert fewstep(monkeypatch, "export", "two", "on-one", "--base", base) == 0
    Path("model.safetensors").rename("elsewhere.safetensors")
    assert fewstep(monkeypatch, "export", "one", "on-two", "--base", "whole") == 0  # its own base is not at hand


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.slow
def test_sdxl_in_one_file(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(Path("whole"), method=TDM)
    assert fewstep(monkeypatch, "distill", path, "--teacher", base, "--out", "one") == 0
    assert (seen(Path("one")) - sample(load_student("one/final"), ["red cat"])[0]).abs().max() < 0.02
    assert fewstep(monkeypatch, "export", "one", "kohya", "--format", "kohya") == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_a_style_on_a_file_without_its_autoencoder(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(Path("whole"), method=TDM)
    assert fewstep(monkeypatch, "distill", path, "--out", "style") == 0
    assert fewstep(monkeypatch, "export", "style", "kohya", "--format", "kohya") == 0
    (file,) = Path("kohya").glob("*-kohya.safetensors")
    save_file({k: v * 300 if "lora_up" in k else v for k, v in load_file(file).items()}, "style.safetensors")
    save_file(
        {k: v for k, v in load_file("model.safetensors").items() if not k.startswith("first_stage_model.")},
        "less.safetensors",
    )
    assert (
        fewstep(
            monkeypatch,
            "distill",
            path,
            "--teacher",
            "less.safetensors@whole",
            "--fuse-lora",
            "style.safetensors@0.5",
            "--out",
            "one",
        )
        == 0
    )
    card = read_card(Path("one/final"))
    assert (
        card.base == absolute("less.safetensors@whole + style.safetensors@0.5") and card.name == "less-style-tdm-2step"
    )
    assert card.base_hash == fingerprint(load_teacher("whole + style.safetensors@0.5").module)
    assert (
        f'fewstep.load_teacher("{called(card.base)}").pipe  # its file has no vae'
        in Path("one/final/README.md").read_text()
    )
    assert (seen(Path("one")) - sample(load_student("one/final"), ["red cat"])[0]).abs().max() < 0.02


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_what_inspect_says_of_a_file(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "inspect", "model.safetensors") == 0
    assert re.search(r"kind +checkpoint of a StableDiffusionXLPipeline", capsys.readouterr().out)
    assert fewstep(monkeypatch, "inspect", base) == 0
    assert re.search(rf"hash +{fingerprint(load_teacher('whole').module)}", capsys.readouterr().out)


@pytest.mark.parametrize("family", ["sd"], indirect=True)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.safetensors", "error: teacher: the configuration of model.safetensors is not to be had from"),
        ("model.safetensors@nowhere", "offline pass model.safetensors@FOLDER"),
        ("model.ckpt", "error: teacher: model.ckpt is a pickle"),
        ("nowhere.safetensors", "error: teacher: nowhere.safetensors is missing or damaged"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(
    base: str, given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.ckpt").write_bytes(b"")
    path = recipe(Path("whole"))
    for command in (("distill",), ("distill", "--dry-run"), ("plan",)):
        assert fewstep(monkeypatch, *command, path, "--teacher", given) == 2
        assert said in error_of(capsys)
    assert not Path("runs").exists()
