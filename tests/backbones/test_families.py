"""Every family of pipelines as a backbone: it keeps the protocol, and draws what its own pipeline draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor

import fewstep
from fewstep.backbones.base import guided
from fewstep.backbones.generate import pictures
from fewstep.backbones.load import load_teacher, pipeline_of
from fewstep.backbones.schedulers import student_scheduler
from fewstep.checks import check_backbone
from fewstep.cli.ending import write_student
from fewstep.core import timegrid
from fewstep.export.card import StudentCard

from .. import pipelines, tiny

PROMPTS = ["red cat", "a photo of a green house"]


@pytest.fixture(scope="module", params=pipelines.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save(family, tmp_path_factory.mktemp("families") / family)


def test_a_family_keeps_the_protocol(folder: Path) -> None:
    check_backbone(load_teacher(folder), PROMPTS)


def test_own_networks_keep_the_protocol() -> None:
    check_backbone(tiny.denoiser(), PROMPTS)
    check_backbone(tiny.flow_denoiser(), PROMPTS)


def drawn(pipe: DiffusionPipeline, steps: int, guidance: float) -> Tensor:
    """What the pipeline itself draws for the prompts and seeds of these tests."""
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    options: dict[str, Any] = {}
    if isinstance(pipe, PixArtAlphaPipeline | PixArtSigmaPipeline):
        options = {"use_resolution_binning": False, "clean_caption": False}  # tiny pictures are in no bin
    elif isinstance(pipe, CogVideoXPipeline):
        options = {"max_sequence_length": pipelines.LENGTH}
    result = pipe(prompt=PROMPTS, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt", **options)
    return result.frames if isinstance(pipe, CogVideoXPipeline) else result.images


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 3.5)])
def test_pictures_are_those_of_the_pipeline(folder: Path, steps: int, guidance: float) -> None:
    """Same prompts, same seeds, a stock scheduler with a student's times."""
    backbone = load_teacher(folder)
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    ours = pictures(backbone, guided(backbone, backbone.module, cond, null, guidance), [3, 4], timegrid.uniform(backbone.schedule, steps))
    pipe = pipeline_of(backbone)
    pipe.scheduler = student_scheduler(backbone.scheduler_config, [steps], "ddim")
    theirs = drawn(pipe, steps, guidance)
    assert ours.shape == theirs.shape
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_a_student_goes_to_files_and_comes_back(folder: Path, share: bool, tmp_path: Path) -> None:
    """Two steps of TDM for two step counts, written, loaded by fewstep and as a pipeline: one picture each."""
    teacher = load_teacher(folder)
    method = fewstep.TDM(steps=(2, 1), guidance=3.0, warmup=0)
    *_, step = fewstep.distill(teacher, method, PROMPTS, iterations=2, batch=2, lr=0.02, share=share, rank=2)
    grids = {str(k): method.times(teacher.schedule, k) for k in method.counts}
    card = StudentCard(
        "tiny", "tdm-unify", str(folder), "", method.counts, {k: v.tolist() for k, v in grids.items()}, dict.fromkeys(grids, "ddim"), "",
        "lora" if share else "full", 2 if share else None, 2.0 if share else None, 3.0, "other", 2, 1.0, "", "", time_layer=teacher.time_layer,
    )  # fmt: skip
    own = {k: fewstep.sample(step, PROMPTS, [3, 4], steps=k) for k in method.counts}
    assert (own[2] - fewstep.sample(teacher, PROMPTS, [3, 4], steps=2)).abs().max() > 1e-3
    with step.roles.averaged():
        write_student(tmp_path / "final", card, step.roles, grids["2"][:-1])
    loaded = fewstep.load_student(tmp_path / "final")
    pipe = fewstep.load(folder, tmp_path / "final")
    for k in method.counts:
        torch.testing.assert_close(fewstep.sample(loaded, PROMPTS, [3, 4], steps=k), own[k], rtol=0, atol=1e-4)
        torch.testing.assert_close(drawn(pipe, k, 1.0), own[k], rtol=0, atol=1e-4)
