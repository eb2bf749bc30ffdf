"""Every shipped recipe says what it costs and can be run as it is; the help pages in docs/ are those of the program."""

import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from fewstep.backbones import miniature
from fewstep.backbones.unconditional import edm_scheduler, pixel_unet, save_pixel_model
from fewstep.cli import main
from fewstep.core.guidance import Guidance
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.recipes_path import recipe_names, recipe_path
from fewstep.runs.recipe import DistillRecipe, first_stage, kind_of, read_recipe
from fewstep.zoo.pixel_teacher import PixelTeacherConfig
from fewstep.zoo.teacher import TeacherConfig

from .. import pipelines
from ..project import ROOT
from .common import COMMANDS, fewstep

MODELS: dict[str, type[BaseModel]] = {
    "distill": DistillRecipe,
    "teacher": TeacherConfig,
    "pixel-teacher": PixelTeacherConfig,
}
HUB = {
    "stable-diffusion-v1": "sd",
    "stable-diffusion-xl": "sdxl",
    "PixArt": "pixart",
    "CogVideoX": "cogvideox",
    "Wan2.1": "wan",
    "Wan2.2-TI2V": "wan-5b",
    "Wan2.2-T2V": "wan-a14b",
    "stable-diffusion-3.5": "sd3",
    "FLUX.2-klein": "flux2",
    "FLUX.2-dev": "flux2-dev",
    "FLUX.1-dev": "flux",
    "Qwen-Image-2.1": "qwenimage21",
    "Qwen-Image": "qwenimage",
    "Z-Image": "zimage",
    "Krea-2": "krea2",
}


FROM_HUB = [n for n in recipe_names() if kind_of(n) == "distill" and any(w in recipe_path(n).read_text() for w in HUB)]
QUICK = ("sd15-tdm4-lora", "sdxl-tdm4", "flux-tdm4-lora", "wan21-tdm4-lora")  # the others are dry-run among the slow


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_a_header_and_holds_no_mistake(name: str) -> None:
    assert recipe_path(name).read_text().startswith("# ")
    read_recipe(name, [], MODELS[kind_of(name)])


# TDM, appendix D: batch, iterations of each stage, the student's and the fake score's rates, guidance.
# Gradients are clipped at 1 in all.
PAPER = {
    "sd15-tdm4": (256, [3000], 2e-6, 2e-5, 3.5),
    "sd15-unify": (256, [20000], 2e-6, 2e-5, 3.5),
    "sdxl-tdm4": (64, [1000, 1000], 1e-6, 5e-6, 8.0),
    "pixart-tdm4": (32, [500], 2e-6, 2e-5, 3.5),
}
TEACHERS = {
    "sd15": "stable-diffusion-v1-5",
    "sdxl": "stable-diffusion-xl-base-1.0",
    "pixart": "PixArt-XL-2-1024-MS",
    "cogvideox": "CogVideoX-2b",
    "wan21": "Wan2.1-T2V",
    "wan22": "Wan2.2-T",
    "sd35m": "stable-diffusion-3.5-medium",
    "sd35l": "stable-diffusion-3.5-large",
    "flux2": "FLUX.2-",
    "flux": "FLUX.1-dev",
    "qwenimage": "Qwen-Image",
    "qwenimage21": "Qwen-Image-2.1",
    "zimage": "Z-Image",
    "krea2": "Krea-2-Raw",
}
GUIDANCE = {
    "sd15": 3.5, "sdxl": 8.0, "pixart": 3.5, "cogvideox": 6.0, "wan21": 3.5, "wan22": 3.5, "sd35m": 4.5, "sd35l": 4.5,
    "flux2": 4.0, "flux": 3.5, "qwenimage": 4.0, "zimage": 6.0, "krea2": 5.5,
    "qwenimage21": 1.0,
}  # fmt: skip
HUB_RECIPES = [n for n in recipe_names() if n.partition("-")[0] in TEACHERS]


def stages(name: str) -> list[DistillRecipe]:
    recipe = read_recipe(name, [], DistillRecipe)
    return [recipe] if recipe.warm_start is None else [first_stage(recipe), recipe]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_with_all_weights_has_the_papers_settings(name: str) -> None:
    batch, iterations, lr, fake_lr, guidance = PAPER[name]
    for stage, length in zip(stages(name), iterations, strict=True):
        train, method = stage.train, stage.method
        assert isinstance(method, DistributionMatching)
        assert (train.global_batch, train.lr, train.fake_lr, method.guidance) == (
            batch,
            lr,
            fake_lr,
            Guidance(scale=guidance),
        )
        assert train.iterations - method.warmup == length
        assert (train.betas, train.clip, train.decay, train.lr_warmup) == ((0.0, 0.999), 1.0, 0, 0)
        assert not stage.roles.lora
        assert replace(method, steps=4, name="tdm", guidance=Guidance(scale=3.5), warmup=100) == DistributionMatching()
        header = recipe_path(name).read_text(encoding="utf-8").partition("\nkind:")[0]
        for own in (f"{method.warmup} iterations of warm-up", f"ema {train.ema}"):  # what the paper has not
            assert own in header, own
    if len(iterations) > 1:  # the fake score of the second begins as the teacher: nothing but the student is taken over
        assert [stage.size for stage in stages(name)] == [512, 1024]


@pytest.mark.parametrize("name", HUB_RECIPES)
def test_a_recipe_of_a_family_has_the_papers_teacher_and_guidance(name: str) -> None:
    family = name.partition("-")[0]
    for stage in stages(name):
        assert TEACHERS[family] in stage.teacher
        assert isinstance(stage.method, DistributionMatching)
        assert stage.method.guidance == Guidance(scale=GUIDANCE[family])
        assert stage.train.batch * stage.train.on(1).accumulate >= 8
        if name.endswith("-lora"):  # one set of rates for all: those of runs with LoRA on the bundled teacher
            assert (stage.train.lr, stage.train.fake_lr) == (5e-5, 2e-4)
            assert "nobody has tried" in recipe_path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("counted", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in FROM_HUB and n not in QUICK else ())
        for n in recipe_names()
        if kind_of(n) == "distill"
    ],
)
def test_a_distillation_recipe_passes_its_dry_run(
    name: str,
    counted: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Also with its memory counted, which takes most of the time."""
    if not counted:
        request.getfixturevalue("uncounted")
    monkeypatch.chdir(tmp_path)
    teacher = Path(read_recipe(name, [], DistillRecipe).teacher)
    if teacher.parts[0] == "runs":  # made by another recipe: a stand-in of its kind
        classes = [f"class {i}" for i in range(10)]
        save_pixel_model(
            teacher, pixel_unet([8, 16], [False, True], 3, 32, len(classes)), miniature.scheduler(), classes
        )
        (teacher / "prompts.txt").write_text("\n".join(classes))
    instead = []
    if family := next(
        (f for word, f in HUB.items() if word in str(teacher)), None
    ):  # from the hub: a stand-in of its family
        instead = ["--teacher", str(pipelines.save(family, tmp_path / family))]
        instead += ["--set", "size=null"] * family.startswith("wan")  # larger than the stand-in has positions for
        if family in pipelines.SIZES:
            instead += ["--set", f"size={pipelines.SIZES[family]}"]
        instead += ["--set", "roles.quantize=null"]  # no layer of the stand-in is wide enough
        Path("prompts.txt").write_text("a red fox\nthe sea\n")
    before = sorted(tmp_path.rglob("*"))
    assert fewstep(monkeypatch, "distill", name, "--dry-run", *instead) == 0
    times = (
        "[999.0, 599.0, 332.0, 142.0, -1.0]"
        if name in ("emoji-tdm4", "emoji-unify", "stages")
        else "[1.0, 0.9, 0.75, 0.5, 0.0]"  # shifted
        if name.startswith(("wan", "sd35"))
        else "[1.0, "  # shifted by the size of the images
        if family in pipelines.SIZES
        else "[999.0, 749.0, 499.0, 249.0, -1.0]"
    )  # theirs are uneven
    assert f"times, 4 steps: {times}" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("uncounted")
def test_trajp_l_s_recipe_passes_its_dry_run_with_edm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pixel_model(Path("edm"), pixel_unet([8, 16], [False, True], 3, 32, 2), edm_scheduler(0.5), ["cat", "dog"])
    Path("names.txt").write_text("cat\ndog\n")
    assert (
        fewstep(monkeypatch, "distill", "cifar10-trajpl", "--dry-run", "--teacher", "edm", "--prompts", "names.txt")
        == 0
    )
    assert "times, 2 steps: [80.0, 2.5" in capsys.readouterr().out


def test_a_teacher_has_as_many_parameters_as_its_recipe_says() -> None:
    config = read_recipe("cifar10-teacher", ["process=edm", "sigma_data=0.5"], PixelTeacherConfig)
    with torch.device("meta"):
        net = pixel_unet(config.channels, config.attention, 3, 32, 10, config.groups, config.layers, config.dropout)
    said = re.search(r"of ([\d.]+)M parameters", recipe_path("cifar10-teacher").read_text())
    assert said is not None
    assert float(said[1]) == round(sum(p.numel() for p in net.parameters()) / 1e6, 1)


def test_a_word_is_no_boolean(tmp_path: Path) -> None:
    """YAML of old takes `no`, `yes`, `on` and `off` for them, and no precision could be said."""
    (tmp_path / "own.yaml").write_text(recipe_path("demo").read_text().replace("train: {", "train: {precision: no, "))
    for source, sets in ((str(tmp_path / "own.yaml"), []), ("sd15-tdm4-lora", ["train.precision=no"])):
        assert (
            read_recipe(source, [*sets, "roles.lora=true", "roles.checkpointing=FALSE"], DistillRecipe).train.precision
            == "no"
        )
    with pytest.raises(ValueError, match=r"train\.precision: input should be 'no' or 'bf16', got 'nothing'"):
        read_recipe("demo", ["train.precision=nothing"], DistillRecipe)
    assert read_recipe("demo", ["prompts.source=true story.txt"], DistillRecipe).prompts.source == "true story.txt"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: [[1]]", "kind: input should be 'distill', got [[1]]"),
        ("kind: distill\nname: a\nteacher: b\nmethod:\n", "method: got null, allowed are settings"),
        ("kind: distill\nname: a\nteacher: b\nmethod: 1.5\n", "method: got 1.5, allowed are settings"),
        ("kind: distill\nname: a\nteacher: b\nmethod: [tdm]\n", "method: got ['tdm'], allowed are settings"),
        ("kind: distill\nname: a\nteacher: b\nmethod: {name: {}}\n", "method"),
        (BOMB, "its & and * make 1,234,567,909 values of it"),
        ("a: &a [*a]", "a value of it holds itself (& and *)"),
        ("a: &a {b: *a}", "a value of it holds itself (& and *)"),
        ("[" * 3000, "nested too deeply"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: !!binary x", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2001-99-99", "is not YAML"),
        ("--- a\n--- b", "expected a single document"),
        ("{[a]: b}", "found unhashable key"),
        ("\0", "is not YAML"),
        ("", "holds no settings"),
    ],
    ids=lambda text: text[-20:].encode("unicode_escape").decode(),
)
def test_a_recipe_of_another_kind_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)) as told:
        read_recipe(str(tmp_path / "a.yaml"), [], DistillRecipe)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400 + len(str(tmp_path))
    for setting in ("[" * 3000, "&a [*a]", "!!timestamp x"):
        with pytest.raises(ValueError, match=r"--set: the value of train\.lr is not YAML"):
            read_recipe("demo", [f"train.lr={setting}"], DistillRecipe)


def test_the_help_pages_are_up_to_date() -> None:
    """Write them anew with `FEWSTEP_WRITE_HELP=1 python -m pytest tests/cli/test_recipes.py`."""
    if not re.search(
        rf"^typer=={re.escape(typer.__version__)}(?:\s|$)",
        (ROOT / "constraints.txt").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        pytest.skip("another typer lays them out in another way")
    runner, pages = CliRunner(), ["# The command line\n"]
    for command in ("", *COMMANDS):
        arguments = [*([command] if command else []), "--help"]
        text = runner.invoke(
            main.app, arguments, prog_name="fewstep", env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
        ).stdout
        pages.append(
            f"## fewstep {command}".rstrip()
            + "\n\n```\n"
            + "\n".join(line.rstrip() for line in text.strip().splitlines())
            + "\n```\n"
        )
    page, expected = ROOT / "docs" / "help.md", "\n".join(pages)
    if os.environ.get("FEWSTEP_WRITE_HELP"):
        page.write_text(expected)
    assert page.read_text() == expected


def test_a_setting_of_a_block_follows_a_number_in_the_blocks_place() -> None:
    """`guidance: 4.5` is the scale, beside which others are set."""
    assert read_recipe("demo", ["method.guidance.scale=3"], DistillRecipe).method.guidance.scale == 3
    tilted = read_recipe("demo", ["method.guidance.tilt=0.5"], DistillRecipe).method.guidance
    assert (tilted.scale, tilted.tilt) == (4.5, 0.5)
    with pytest.raises(ValueError, match="leads into a plain value"):
        read_recipe("demo", ["method.steps.first=3"], DistillRecipe)
