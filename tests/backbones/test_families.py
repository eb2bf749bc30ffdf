"""Every family of pipelines as a backbone: it keeps the protocol, and draws what its own pipeline draws."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionUpscalePipeline
from torch import Tensor

import fewstep
from fewstep.backbones.autoencoders import over_white
from fewstep.backbones.base import guided
from fewstep.backbones.families import FAMILIES, family_of_pipeline
from fewstep.backbones.family import Family
from fewstep.backbones.few_step import drawn
from fewstep.backbones.generate import sample_images
from fewstep.backbones.load import at_size, pipeline_of
from fewstep.backbones.qwenimage21 import Qwen3VLProcessor
from fewstep.backbones.schedulers import student_scheduler
from fewstep.checks import check_backbone
from fewstep.cli.export import run_export
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import Flow
from fewstep.student.formats import FORMATS

from .. import pipelines, tiny

PROMPTS = ["red cat", "a photo of a green house"]


@pytest.fixture(scope="module", params=pipelines.cases())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save(family, tmp_path_factory.mktemp("families") / family)


@pytest.fixture(scope="module", params=pipelines.cases(pipelines.LONG_TRAINED))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's folder, for tests that train on it."""
    return pipelines.save(request.param, tmp_path_factory.mktemp("trained") / request.param)


def test_a_family_keeps_the_protocol(folder: Path) -> None:
    check_backbone(pipelines.load(folder), PROMPTS)


def sizes(family: str) -> tuple[int | None, ...]:
    """Two sizes of images, or None for a family that has one."""
    own = {"sd": 32, "sdxl": 64, "sd3": 24, "pixart": 24, "pixart-sigma": 24}
    if family == "qwenimage21":
        return (32, 64)
    return (None, own[family]) if family in own else (16, 24) if family in pipelines.SIZES else (None,)


def test_what_the_networks_are_told_is_what_the_pipeline_tells_them(family: str, folder: Path) -> None:
    """Guided images of the pipeline's own call, with its own negative prompt, sizes and masks.

    Pipelines with Euler's steps of flow take their own, others those of a student.
    """
    backbone, seen = pipelines.load(folder), list[Tensor]()
    for size in sizes(family):
        backbone = at_size(backbone, size)
        pipe, schedule = pipeline_of(backbone), backbone.schedule
        cond, null = backbone.encode(PROMPTS), backbone.encode([""])
        euler = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        if not euler:
            pipe.scheduler = student_scheduler(backbone.scheduler_config, [4], "ddim")
        for scale in (1.0, 3.5):
            theirs = drawn(pipe, PROMPTS, 4, scale, size=size or 0)
            times = timegrid.uniform(schedule, 4)
            if euler:
                times = torch.cat([pipe.scheduler.timesteps.double() / 1000, torch.zeros(1).double()])
            denoise = guided(backbone, backbone.module, cond, null, Guidance(scale=scale))
            ours = sample_images(backbone, denoise, [0, 1], times)
            assert ours.shape == theirs.shape and ours.shape[-1] == (size or ours.shape[-1])
            assert ours.std() > 0.01
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            seen.append(ours)
        assert (seen[-1] - seen[-2]).abs().max() > 1e-3  # guidance shows


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_student_goes_to_files_and_comes_back(trained: Path, share: bool, tmp_path: Path) -> None:
    """A student of two step counts draws one image everywhere.

    It is loaded by fewstep, as a pipeline, and exported in every format.
    """
    folder = trained
    teacher = pipelines.load(folder)
    method = fewstep.TDM(steps=(2, 1), warmup=0, guidance=3.0)
    *_, step = fewstep.distill(
        teacher,
        method,
        PROMPTS,
        train=fewstep.TrainConfig(iterations=2, batch=2, lr=0.02),
        roles=fewstep.RolesConfig(lora=share, rank=2),
    )
    own = {k: fewstep.sample(step, PROMPTS, [0, 1], steps=k) for k in method.counts}
    assert (own[2] - fewstep.sample(teacher, PROMPTS, [0, 1], steps=2)).abs().max() > 1e-3
    final = tmp_path / "final"
    with step.roles.averaged():
        step.student().write(final)
    loaded, pipe = fewstep.load_student(final), fewstep.load(folder, final)
    for k in method.counts:
        torch.testing.assert_close(fewstep.sample(loaded, PROMPTS, [0, 1], steps=k), own[k], rtol=0, atol=1e-4)
        torch.testing.assert_close(drawn(pipe, PROMPTS, k), own[k], rtol=0, atol=1e-4)
    kohya = share and folder.name in ("sd", "sdxl")
    for form in FORMATS:
        if form == "kohya" and not kohya:
            why = (
                "kohya's names are for the LoRA of a U-Net"
                if share
                else "got kohya, which is for LoRA, and this student has none"
            )
            with pytest.raises(ValueError, match=f"--format: {why}"):
                run_export(str(final), tmp_path / form, form, 1, None)
            assert not (tmp_path / form).exists()
        else:
            run_export(str(final), tmp_path / form, form, 1, None)
    assert not (final / "comfyui-workflow.json").exists()  # a folder is no checkpoint that it loads
    name = f"{folder.name}-tdm-unify-1-2step"
    kinds = {p.name.removeprefix(f"{name}-") for p in final.glob(f"{name}-*")}
    read = share and not folder.name.startswith("pixart")  # no program reads a LoRA of PixArt by itself
    assert kinds == ({"kohya.safetensors" if kohya else "lora.safetensors"} if read else set())
    assert (final / "peft").exists() == (share and folder.name.startswith("pixart"))


def test_times_of_its_own_go_with_a_student(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that no step count says goes with the student.

    fewstep knows the grid from the folder, a stock pipeline is told it, and a format that cannot be told it is
    refused.
    """
    folder = trained
    teacher, method = pipelines.load(folder), fewstep.TDM(steps=2, warmup=0, shift=2, guidance=3.0)
    times = method.times(teacher.schedule)
    assert not timegrid.even(teacher.schedule, times)
    *_, step = fewstep.distill(
        teacher,
        method,
        PROMPTS,
        train=fewstep.TrainConfig(iterations=2, batch=2, lr=0.02),
        roles=fewstep.RolesConfig(rank=2),
    )
    own, final = fewstep.sample(step, PROMPTS, [0, 1]), tmp_path / "final"
    with step.roles.averaged():
        step.student().write(final)
    torch.testing.assert_close(fewstep.sample(fewstep.load_student(final), PROMPTS, [0, 1]), own, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn(fewstep.load(folder, final), PROMPTS, 2), own, rtol=0, atol=1e-4)
    told, said = (
        folder.name not in ("sd", "cogvideox", "cogvideox-rotary", "wan"),
        (final / "README.md").read_text(),
    )
    flow = isinstance(teacher.schedule, Flow)
    given = [1, 0.6666666667] if flow else times[:-1].tolist()
    how = f"{'sigmas' if flow else 'timesteps'}=[{', '.join(f'{t:.8g}' for t in given)}]"
    assert (how in said) == told
    assert ('pipe = fewstep.load("' in said) != told
    assert not (final / "comfyui-workflow.json").exists()
    if told and not folder.name.startswith("pixart"):
        if folder.name == "qwenimage21":  # what a machine with torchvision has
            whole = staticmethod(lambda place, **_: Qwen3VLProcessor.from_pretrained(place))
            monkeypatch.setattr(transformers.Qwen3VLProcessor, "from_pretrained", whole)
        snippet, names = re.search(r"```python\n(.*?)```", said, re.DOTALL), dict[str, Any]()
        assert snippet is not None
        monkeypatch.chdir(folder.parent)  # cards name a base on this machine without the folders above it
        exec(snippet[1].replace("a prompt", PROMPTS[0]).replace('"final"', f'"{final}"'), names)
        seen = over_white(torch.from_numpy(np.array(names["image"])).permute(2, 0, 1) / 255)
        rounded = 2 if folder.name == "qwenimage21" else 1  # colours and alpha
        torch.testing.assert_close(seen, own[0], rtol=0, atol=0.51 * rounded / 255)
    for form in ("student", "merged"):
        run_export(str(final), tmp_path / form, form, None, None)
    if not told:
        for form in ("pipeline", *(["kohya"] if folder.name == "sd" else [])):
            with pytest.raises(ValueError, match="--format: this student's times are its own"):
                run_export(str(final), tmp_path / form, form, None, None)
    else:
        run_export(str(final), tmp_path / "pipeline", "pipeline", None, None)
        if folder.name == "sdxl":
            run_export(str(final), tmp_path / "kohya", "kohya", None, None)


def without_tiny_pipeline(families: Iterable[Family]) -> list[str]:
    """Those that no tiny pipeline of the tests is of."""
    there = {family_of_pipeline(make()).name for make in (*pipelines.FAMILIES.values(), *pipelines.PIXELS.values())}
    return [family.name for family in families if family.name not in there]


def test_every_family_has_a_tiny_pipeline() -> None:
    """A row in `FAMILIES` without one would be tested by nothing."""
    missing = without_tiny_pipeline(FAMILIES.values())
    assert not missing, f"tests/pipelines.py has no tiny {', '.join(missing)}: add one to FAMILIES there, or to PIXELS"
    new = replace(FAMILIES["StableDiffusionPipeline"], pipeline=StableDiffusionUpscalePipeline)
    assert without_tiny_pipeline([*FAMILIES.values(), new]) == ["StableDiffusionUpscalePipeline"]


def test_own_networks_keep_the_protocol() -> None:
    check_backbone(tiny.denoiser(), PROMPTS)
    check_backbone(tiny.flow_denoiser(), PROMPTS)
