"""Public students beside one's own, from the files that their pages offer; tiny ones in their place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fewstep.api import load_student
from fewstep.backbones.families import FAMILIES
from fewstep.backbones.load import at_size, pipeline_of
from fewstep.backbones.parts import denoiser_of
from fewstep.backbones.rivals import RIVALS, Rival, draw_rival, rival_named, rival_pipeline
from fewstep.core.solvers import SOLVERS
from fewstep.evaluation.images import ImageProtocol
from fewstep.evaluation.weights import PLACE
from fewstep.runs.sampling import sample

from .. import pipelines
from .common import error_of
from .common import fewstep as command

pytestmark = pytest.mark.usefixtures("few_draws")


def placed(final: Path, repo: str, name: str, weights: Path) -> Path:
    """The student's LoRA under a public student's name, where weights are looked for."""
    folder = weights / repo.replace("/", "--")
    folder.mkdir(parents=True)
    shutil.copyfile(final / "pytorch_lora_weights.safetensors", folder / name)
    return folder


def test_a_lora_is_sampled_as_its_page_says(final: Path, tmp_path: Path) -> None:
    """A student's own LoRA, sampled by the rules of Hyper-SD, gives its own images: DDIM, trailing, from one noise."""
    student = load_student(final)
    assert student.card.solver["4"] == "ddim" and "ddim" in SOLVERS
    base = pipeline_of(student.backbone)
    rival = rival_named("hyper-sd", base)
    folder = placed(final, rival.repo, rival.files[0], tmp_path)
    pipe = rival_pipeline(base, rival, folder)
    prompts, seeds = ["red cat", "blue dog"], [3, 4]
    theirs = draw_rival(pipe, rival, prompts, seeds, student.backbone.shape, student.backbone.image_size)
    own = sample(student, prompts, seeds)
    plain = sample(student.backbone, prompts, seeds, steps=4)
    assert (theirs - own).abs().max() <= 0.02 < (theirs - plain).abs().max()


def test_students_stand_beside_rivals_and_are_compared_by_image(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "weights"))
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 6, 2, seeds=3),))
    for name in ("lcm-lora", "tcd"):
        rival = next(r for r in RIVALS if r.name == name and r.base == "StableDiffusionPipeline")
        placed(final, rival.repo, rival.files[0], tmp_path / "weights")
    shutil.copytree(final, "again")
    assert command(monkeypatch, "evaluate", final, "--against", "lcm-lora,tcd,again") == 0
    result = json.loads((final / "eval.json").read_text())
    models = [row["model"] for row in result["rows"]]
    assert models[-3:-1] == ["lcm-lora", "tcd"] and result["rows"][-2]["nfe"] == 4
    assert result["rows"][-1]["teacher_distance"] == pytest.approx(result["rows"][-4]["teacher_distance"], rel=1e-4)
    student = models.index("student")
    assert {p["against"] for p in result["paired"] if p["row"] == student} >= set(range(len(models) - 3, len(models)))
    assert "beats lcm-lora@4 (4 NFE) in teacher_distance" in capsys.readouterr().out


def test_what_is_not_there_is_said_in_one_line(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    for name, said in (
        ("hyper-sd", "--against hyper-sd: its weights cannot be had here; put Hyper-SD15-4steps-lora.safetensors of"),
        ("dmd2", "--against: got dmd2, of StableDiffusionPipeline there are lcm-lora, hyper-sd"),
        ("perflow", "--against: perflow cannot be run here: its scheduler is in no diffusers release"),
    ):
        assert command(monkeypatch, "evaluate", final, "--against", name) == 2
        assert said in error_of(capsys)


def lora_of(pipe: DiffusionPipeline, file: Path) -> None:
    """Write a LoRA of random weights for the queries of a pipeline's network."""
    name = "unet" if "unet" in pipe.components else "transformer"
    rng, tensors = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for layer, module in pipe.components[name].named_modules():
        if isinstance(module, torch.nn.Linear) and layer.endswith(("to_q", "to_v")):
            for kind, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                tensors[f"{name}.{layer}.lora_{kind}.weight"] = torch.randn(shape, generator=rng)
    save_file(tensors, file)


FAMILY = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "CogVideoXPipeline": "cogvideox",
    "QwenImagePipeline": "qwenimage",
    "Flux2KleinPipeline": "flux2",
    "ZImagePipeline": "zimage",
    "Krea2Pipeline": "krea2",
}


FAST = {"lcm-lora-sd", "sdxl-lightning-sdxl", "sdxl-turbo-sdxl", "tdm-sd3", "tdm-cogvideox"}  # one of each kind


def named(rival: Rival) -> str:
    return f"{rival.name}-{FAMILY[rival.base]}"


@pytest.mark.parametrize(
    "rival",
    [pytest.param(r, id=named(r), marks=() if named(r) in FAST else pytest.mark.slow) for r in RIVALS if not r.missing],
)
def test_every_rival_samples_from_files_of_its_kind(rival: Rival, tmp_path: Path) -> None:
    """On a tiny pipeline of its base: its weights change the images, the base keeps its own, one noise one image."""
    family = FAMILY[rival.base]
    backbone = at_size(pipelines.load(pipelines.save(family, tmp_path / "base")), pipelines.SIZES.get(family))
    base = pipeline_of(backbone)
    before = {k: v.clone() for k, v in denoiser_of(base).state_dict().items()}
    folder, file = tmp_path / "rival", (rival.files or ("any.safetensors",))[0]
    if rival.kind == "pipeline":
        pipelines.save(family, folder, seed=1)
    else:
        folder.mkdir()
        if rival.kind == "lora":
            lora_of(base, folder / file)
        else:
            save_file({k: v + 0.1 for k, v in before.items()}, folder / file)
    pipe = rival_pipeline(base, rival, folder)

    def draw(seeds: list[int]) -> torch.Tensor:
        small = replace(rival, size=0)
        return draw_rival(pipe, small, ["red cat"] * len(seeds), seeds, backbone.shape, backbone.image_size)

    found = draw([3, 4])
    assert found.shape[-3] == 3 and len(found) == 2 and found.isfinite().all()
    assert (draw([3, 4]) - found).abs().max() <= 1e-5 and (found[0] - found[1]).abs().max() > 1e-3
    assert all(torch.equal(before[k], v) for k, v in denoiser_of(base).state_dict().items())
    changed = denoiser_of(pipe).state_dict()
    assert any(not torch.equal(before[k], v) for k, v in changed.items())


def test_a_strength_is_that_of_the_lora(tmp_path: Path) -> None:
    rival = next(r for r in RIVALS if r.strength != 1)
    base = pipelines.load(pipelines.save("sd3", tmp_path / "base"))
    (tmp_path / "rival").mkdir()
    lora_of(pipeline_of(base), file := tmp_path / "rival" / "any.safetensors")
    (tmp_path / "none").mkdir()
    pipe = pipeline_of(base)
    tensors, changed = load_file(file), denoiser_of(rival_pipeline(pipe, rival, file.parent)).state_dict()
    layer = next(k.removesuffix(".lora_A.weight") for k in tensors if k.endswith("lora_A.weight"))
    delta = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    name = f"{layer.removeprefix('transformer.')}.weight"
    found = changed[name] - denoiser_of(pipe).state_dict()[name]
    assert (found - rival.strength * delta).abs().max() <= 1e-5 and rival.strength == 0.125
    with pytest.raises(ValueError, match=r"^--against tdm: .* has 0 safetensors files; leave the one of Luo-Yihong/"):
        rival_pipeline(pipe, rival, tmp_path / "none")
    save_file({"transformer.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "none" / "x.safetensors")
    with pytest.raises(ValueError, match=r"^--against tdm: .* does not fit \(.*\); it is of SD 3 medium; choose"):
        rival_pipeline(pipe, rival, tmp_path / "none")


def test_every_rival_is_of_a_family_or_says_why_not() -> None:
    """Names are one for each base, and the table has those that people compare with, each with its source."""
    assert len({(r.name, r.base) for r in RIVALS}) == len(RIVALS)
    named = {"lcm-lora", "hyper-sd", "tcd", "sdxl-lightning", "sdxl-turbo", "dmd2", "perflow", "tdm", "klein"}
    assert {r.name for r in RIVALS} >= named | {"z-image-turbo", "qwen-lightning", "krea-2-turbo"}
    assert all(r.base in FAMILIES and r.source.startswith("https://") for r in RIVALS)
