"""Prompts, types and teachers are checked before a training. Images that are not finite are an error everywhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import api
from fewstep.backbones.load import load_teacher
from fewstep.roles.roles import RolesConfig
from fewstep.runs.init import roles_for

from .. import pipelines, tiny
from .common import error_of, fewstep
from .families import recipe


@pytest.mark.usefixtures("uncounted")
def test_a_dry_run_says_what_becomes_of_prompts_and_of_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pipelines.save("sd", tmp_path / "sd")
    path = recipe(folder)
    long = "a photo of a green house " * 5
    Path("prompts.txt").write_text(f"{long}red\n{long}blue\n(a:1)\n")
    assert fewstep(monkeypatch, "distill", path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "prompts: 2 of 3 are longer than the 8 tokens of text_encoder" in said
    assert "prompts: of 3 different ones 1 become the condition of another when they are cut" in said
    assert "prompts: 1 of 3 have (words:1.2), a sign of other programs" in said
    assert fewstep(monkeypatch, "distill", path, "--dry-run", "--set", "dtype=float16") == 2
    assert "dtype: input should be 'float32' or 'bfloat16'" in error_of(capsys)
    save_file(
        {
            "lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(2, 4),
            "lora_unet_double_blocks_0_x.lora_up.weight": torch.ones(4, 2),
        },
        "flux.safetensors",
    )
    for command in (
        ("distill", path, "--dry-run", "--fuse-lora", "flux.safetensors"),
        ("distill", path, "--fuse-lora", "flux.safetensors"),
    ):
        assert fewstep(monkeypatch, *command) == 2
        assert (
            "--fuse-lora: flux.safetensors cannot be fused into this teacher (1 of its 1 layers are not there"
            in error_of(capsys)
        )
    assert not Path("runs").exists()
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert fewstep(monkeypatch, "distill", path, "--dry-run") == 2
    assert "text_encoder/ has no weights (no model.safetensors); download it again" in error_of(capsys)


def test_numbers_that_no_network_can_take_are_one_line_for_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is only seen when the network is called, in a folder of configurations alone."""
    monkeypatch.chdir(tmp_path)
    folder = pipelines.save("sd", tmp_path / "sd")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": "small"'))
    assert fewstep(monkeypatch, "plan", recipe(folder)) == 2
    assert "cannot be called as its configuration says (" in error_of(capsys)


def test_half_precision_is_not_trained_in() -> None:
    backbone = tiny.stable_diffusion()
    backbone.module.half()
    with pytest.raises(ValueError, match="dtype: got float16, whose range loses the gradients of a training"):
        roles_for(backbone, api.TDM(steps=2), RolesConfig(rank=2))


def test_images_that_are_not_finite(tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    with torch.no_grad():
        next(backbone.pipe.vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="sample: the images of tiny are not finite; load it in float32 or bfloat16"
    ):
        api.sample(backbone, ["red cat"], steps=1)


def test_black_images_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pipelines.save("sd", tmp_path / "sd")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({n: t * ("decoder.conv_out" not in n) for n, t in load_file(file).items()}, file, {"format": "pt"})
    load_teacher(folder)
    assert fewstep(monkeypatch, "sample", str(folder), "-p", "red cat", "--steps", "1") == 0
    assert "warning: 1 of 1 images are one colour; run fewstep doctor TEACHER" in capsys.readouterr().out
