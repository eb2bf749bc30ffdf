"""`--fuse-lora`: a base with somebody's style as the teacher, and every file that comes of it says so."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.api import load_student, load_teacher, sample
from fewstep.backbones.load import fingerprint, source_of
from fewstep.student.folder import read_card

from .. import pipelines
from ..snippets import snippet_of
from .common import error_of, fewstep
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere")

TDM = {"steps": 2, "warmup": 0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pipelines.save("sd", tmp_path / "sd")


@pytest.fixture
def style(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA as somebody would have it lying around: another student's, in kohya's names, big enough to be seen."""
    assert fewstep(monkeypatch, "distill", recipe(base, method=TDM), "--out", "style") == 0
    assert fewstep(monkeypatch, "export", "style", "kohya", "--format", "kohya") == 0
    (file,) = Path("kohya").glob("*-kohya.safetensors")
    save_file({k: v * 300 if "lora_up" in k else v for k, v in load_file(file).items()}, "style.safetensors")
    return Path("style.safetensors")


def test_fused_weights_are_the_base_plus_so_much_of_the_lora(base: Path, style: Path) -> None:
    plain, fused = load_teacher(base), load_teacher(f"{base} + {style}@0.5")
    beside = load_teacher(base)
    beside.pipe.load_lora_weights(str(style), adapter_name="style")  # type: ignore[attr-defined]
    beside.pipe.set_adapters(["style"], [0.5])  # type: ignore[attr-defined]
    x, t = torch.randn(2, *plain.shape), torch.tensor([500.0, 100.0])
    with torch.no_grad():
        cond = plain.encode(["red cat", "blue dog"])
        own, ours, theirs = (b.predict(b.module, x, t, cond) for b in (plain, fused, beside))
    assert (ours - theirs).abs().max() < 1e-4 < 1e-2 < (ours - own).abs().max()
    assert not [n for n, _ in fused.module.named_modules() if "lora" in n]
    assert fused.name == "sd + style"


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")
def test_a_student_of_base_and_style_in_every_file(
    base: Path, style: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("distill", recipe(base, method=TDM), "--fuse-lora", f"{style}@0.5")
    assert fewstep(monkeypatch, *run, "--dry-run") == 0
    assert fewstep(monkeypatch, *run) == 0
    card = read_card(Path("runs/tiny/final"))
    assert card.base == f"{base} + {style.absolute()}@0.5" and card.name.startswith("sd-style-")
    assert card.base_hash == fingerprint(load_teacher(card.base).module) != fingerprint(load_teacher(base).module)
    assert fewstep(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "--out", "x.png") == 0
    drawn = sample(load_student("runs/tiny/final"), ["red cat"], [0])[0]
    readme = Path("runs/tiny/final/README.md").read_text()
    assert "base_model" not in readme and str(base) not in readme and "fuse_lora(lora_scale=0.5)" in readme
    code = snippet_of(Path("runs/tiny/final"))
    monkeypatch.chdir("runs/tiny")
    Path("style.safetensors").symlink_to("../../style.safetensors")
    names: dict[str, Image.Image] = {}
    exec(code.replace("a prompt", "red cat"), names)
    theirs = torch.tensor(list(names["image"].tobytes())).reshape(names["image"].height, -1, 3).permute(2, 0, 1) / 255
    assert (theirs - drawn).abs().max() < 0.02
    assert "ComfyUI, A1111 and Forge cannot sample it: their noise levels" in readme
    assert fewstep(monkeypatch, "export", "final", "merged", "--format", "merged") == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.safetensors", "there is no nowhere.safetensors"),
        ("style.safetensors@much", "PATH@STRENGTH"),
        ("broken.safetensors", "broken.safetensors cannot be fused"),
    ],
)
def test_a_lora_that_is_none(
    given: str, said: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.safetensors").write_bytes(b"not a file")
    assert fewstep(monkeypatch, "distill", recipe(base), "--fuse-lora", given) == 2
    assert said in error_of(capsys)
    assert not Path("runs").exists()


def test_a_pipeline_that_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": torch.zeros(1)}, "style.safetensors")
    folder = pipelines.save("pixart", tmp_path / "p")
    assert fewstep(monkeypatch, "distill", recipe(folder), "--fuse-lora", "style.safetensors") == 2
    assert "loads no LoRA into a PixArtAlphaPipeline" in error_of(capsys)


def test_sources() -> None:
    assert source_of("owner/name") == ("owner/name", (), "")
    assert source_of("owner/name + a.safetensors@0.8 + b") == ("owner/name", (("a.safetensors", 0.8), ("b", 1.0)), "")
