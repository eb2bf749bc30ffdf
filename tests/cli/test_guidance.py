"""A student that is told its guidance scale (LCM's embedding): sampled, loaded and exported at each of them."""

from pathlib import Path

import pytest
import torch
import yaml

import fewstep
from fewstep.student.folder import read_card

from .common import RECIPE, error_of
from .common import fewstep as command

SCALES = [2.0, 4.0, 6.5]


@pytest.fixture
def told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student of three guidance scales, as LoRA."""
    method = {"name": "lcm", "steps": 2, "guidance": SCALES[0], "guidance_scales": SCALES[1:]}
    value = yaml.safe_load(recipe.read_text()) | {
        "method": method,
        "data": {"source": "teacher", "count": 8, "steps": 2},
    }
    recipe.write_text(yaml.safe_dump(value | {"train": RECIPE["train"] | {"lr": 0.02}}))
    assert command(monkeypatch, "distill", recipe) == 0
    return Path("runs/tiny/final")


@pytest.mark.slow
def test_every_scale_is_another_student(told: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, pipe = fewstep.load_student(told), fewstep.load(teacher, told)
    assert student.card.guidance_scales == tuple(SCALES)
    prompts, seen = ["red cat", "blue dog"], []
    for scale in SCALES:
        own = fewstep.sample(student, prompts, [3, 4], guidance=scale)
        generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
        piped = pipe(prompts, guidance_scale=scale, generator=generators, output_type="pt").images
        assert (piped - own).abs().max() <= 1e-4
        out = f"at-{scale}"
        assert command(monkeypatch, "export", told, out, "--guidance", str(scale)) == 0
        assert (read_card(Path(out)).guidance.scale, read_card(Path(out)).guidance_scales) == (scale, ())
        assert (fewstep.sample(fewstep.load_student(out), prompts, [3, 4]) - own).abs().max() <= 1e-4
        seen.append(own)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert (seen[1] - seen[2]).abs().max() > 1e-3
    default = pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in (3, 4)], output_type="pt").images
    assert (default - seen[0]).abs().max() <= 1e-4
    with pytest.warns(UserWarning, match="got 3.5, this student was trained for 2, 4, 6.5; the nearest is taken"):
        pipe("red cat", guidance_scale=3.5)


def test_what_it_was_not_trained_for_is_refused(
    told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "sample", told, "-p", "red cat", "--guidance", "4", "--out", "x.png") == 0
    capsys.readouterr()
    assert command(monkeypatch, "export", told, "other", "--guidance", "3") == 2
    assert "--guidance: got 3.0, allowed are 2, 4, 6.5" in error_of(capsys)
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("lcm", {"guidance_scales": (1.0,)}, r"^guidance_scales: got \[1\.0\], allowed are different numbers above 1"),
        ("lcm", {"guidance_scales": (3.5,)}, r"^guidance_scales: got \[3\.5\], allowed are different"),
        ("progressive", {"guidance_scales": (2.0,)}, r"^guidance_scales: method progressive has no such setting"),
    ],
)
def test_impossible_scales(name: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fewstep.method(name, **settings)
