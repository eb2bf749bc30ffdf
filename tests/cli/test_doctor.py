"""`fewstep doctor TEACHER`: what a teacher is, in lines, and exit code 2 where it is not sound."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from .. import pipelines
from .common import error_of, fewstep


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return pipelines.save("sd", tmp_path / "sd")


def test_a_sound_teacher(sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fewstep(monkeypatch, "doctor", str(sd)) == 0
    out = capsys.readouterr().out
    assert (
        "ok  model          StableDiffusionPipeline" in out
        and "ok  diffusers      images of 2 steps at guidance 3 differ by" in out
    )
    assert "NO" not in out


@pytest.mark.parametrize(
    ("part", "said"),
    [("unet", "unet/diffusion_pytorch_model.safetensors has numbers"), ("vae", ": its images are one colour")],
)
def test_one_that_is_not(
    part: str, said: str, sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sd / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change = {
        n: t * (float("nan") if part == "unet" else 0)
        for n, t in state.items()
        if n.startswith(("conv_in", "decoder.conv_out"))
    }
    save_file(state | change, file, {"format": "pt"})
    assert fewstep(monkeypatch, "doctor", str(sd)) == 2
    assert said in error_of(capsys)


def test_options_that_are_none(sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fewstep(monkeypatch, "doctor", str(sd), "--dtype", "int8") == 2
    assert "--dtype: got 'int8', allowed are float32, bfloat16, float16" in error_of(capsys)
    assert fewstep(monkeypatch, "doctor", "./nowhere") == 2
    assert "teacher: got './nowhere'" in error_of(capsys)
