"""Wan draws what its own pipeline draws, at any size, and its students are right in every program."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.backbones.base import guided
from fewstep.backbones.few_step import drawn
from fewstep.backbones.generate import pictures
from fewstep.backbones.load import load_teacher, pipeline_of
from fewstep.backbones.lora import changes_of, fuse, places_in
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.schedulers import student_scheduler
from fewstep.backbones.wan import original_names
from fewstep.cli.export import run_export
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance

from .. import pipelines

PROMPTS = ["red cat", "a photo of a green house"]
OTHER = "32x16x1"  # a size that is no square, of one frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("wan", tmp_path_factory.mktemp("wan") / "wan")


@pytest.mark.parametrize("size", [None, OTHER])
def test_guided_videos_are_those_of_the_pipeline(folder: Path, size: str | None) -> None:
    backbone = load_teacher(folder, size=size)
    assert backbone.shape == ((4, 2, 4, 4) if size is None else (4, 1, 2, 4))
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    for scale in (1.0, 5.0):
        denoise = guided(backbone, backbone.module, cond, null, Guidance(scale=scale))
        ours = pictures(backbone, denoise, [0, 1], timegrid.uniform(backbone.schedule, 4))
        pipe = pipeline_of(backbone)
        pipe.scheduler = student_scheduler(backbone.scheduler_config, [4], "ddim")
        theirs = drawn(pipe, PROMPTS, 4, scale, size=size or 0)
        assert ours.shape == theirs.shape and ours.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_process_is_that_of_the_multistep_solver(folder: Path) -> None:
    """UniPC's own noise levels, shifted, lie on the process."""
    backbone = load_teacher(folder)
    scheduler = pipeline_of(backbone).scheduler
    scheduler.set_timesteps(7)
    told = scheduler.sigmas[:-1].double()
    schedule = backbone.schedule
    raw = (told / (3 - 2 * told)).clamp(max=1)  # the shift undone
    torch.testing.assert_close(schedule.at(raw), told, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps.double(), (told * 1000).floor(), rtol=0, atol=1.01)
    assert meta_teacher(folder).schedule == schedule


@pytest.fixture(scope="module")
def student(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A student of another size than the pipeline's own, and what it draws."""
    final = tmp_path_factory.mktemp("student") / "final"
    *_, step = fewstep.distill(
        load_teacher(folder, size=OTHER),
        fewstep.TDM(steps=2, warmup=0, guidance=3.0),
        PROMPTS,
        train=fewstep.TrainConfig(iterations=1, batch=2, lr=0.02),
        roles=fewstep.RolesConfig(rank=2, exclude=()),
    )
    with step.roles.averaged():
        step.student().write(final)
    return final, fewstep.sample(step, PROMPTS, [0, 1])


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "wan-tdm-2step-lora.safetensors"])
def test_a_stock_pipeline_loads_the_lora(folder: Path, student: tuple[Path, torch.Tensor], name: str) -> None:
    """Under diffusers' names, and under the original ones that ComfyUI has."""
    final, own = student
    assert fewstep.load_student(final).card.size == OTHER
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    before = drawn(pipe, PROMPTS, 2, size=OTHER)
    pipe.load_lora_weights(str(final), weight_name=name)
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(final, subfolder="scheduler")
    found = drawn(pipe, PROMPTS, 2, size=OTHER)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 1e-3
    assert "height=16, width=32, num_frames=1" in (final / "README.md").read_text()


def test_an_exported_pipeline_draws_the_students_size(student: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    final, own = student
    run_export(str(final), tmp_path / "whole", "pipeline", None, None)
    pipe = WanPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(pipe, PROMPTS, 2, size=OTHER), own, rtol=0, atol=1e-4)
    few = fewstep.load(tmp_path / "whole", final)(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    assert few.frames.shape == (2, 1, 16, 32, 3)


def test_every_layer_has_an_original_name(folder: Path, student: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """A LoRA under the names of ComfyUI or musubi's scripts is fused as under diffusers' own."""
    pipe = WanPipeline.from_pretrained(folder)
    names = dict(original_names(pipe.transformer))
    linear = {n for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == names.keys() - {"patch_embedding"} and len(set(names.values())) == len(names)
    own = {f"{t.part}.{t.name}": c for t, c in changes_of(pipe, str(student[0] / "pytorch_lora_weights.safetensors"), 1)}
    file = next(student[0].glob("*-lora.safetensors"))
    named = load_file(file)
    assert all(k.startswith("diffusion_model.") for k in named)
    flat = {}
    for key, tensor in named.items():
        layer, _, role = key.removeprefix("diffusion_model.").rpartition(".lora_")
        stem = "lora_unet_" + layer.replace(".", "_")
        flat[f"{stem}.lora_{'down' if role.startswith('A') else 'up'}.weight"] = tensor
        flat[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(flat, tmp_path / "musubi.safetensors")
    for other in (file, tmp_path / "musubi.safetensors"):
        found = {f"{t.part}.{t.name}": c for t, c in changes_of(pipe, str(other), 1)}
        assert found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)
    assert fuse(pipe, str(file), 1.0) == len(own)
    assert len(places_in(pipe)) > len(own)


def test_half_precision_keeps_what_the_library_keeps(folder: Path) -> None:
    backbone = load_teacher(folder, torch.bfloat16)
    kinds = {n: p.dtype for n, p in backbone.module.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == kinds["scale_shift_table"] == torch.float32


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (32, "size: got 32, allowed for videos are width, height and frames, e.g. 832x480x81"),
        ("32x32", "size: got 32x32, allowed for videos"),
        ("32x24x5", r"allowed for wan are widths in multiples of 16, heights of 16, and 4 n \+ 1 frames, up to 32x32x5"),
        ("32x32x4", "4 n"),
        ("48x32x5", "up to 32x32x5"),
        ("0x32x5", "up to"),
    ],
)
def test_a_size_that_it_cannot_have(folder: Path, size: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_teacher(folder, size=size)


@pytest.mark.parametrize(
    ("place", "setting", "value", "said"),
    [
        ("transformer", "in_channels", 9, "more are for video from images"),
        ("transformer", "image_dim", 32, "text-to-video takes no images"),
        ("transformer", "patch_size", [2, 2, 2], "allowed is a patch of one frame"),
        ("transformer", "text_dim", 64, "its text encoders give 32"),
        ("vae", "latents_std", [1.0], "allowed are 4 numbers, one a channel"),
        ("vae", "latents_std", [1.0, 0.0, 1.0, 1.0], "allowed are positive numbers"),
        ("scheduler", "use_flow_sigmas", False, "is no scheduler of flow matching"),
        ("scheduler", "flow_shift", 0, "allowed are positive numbers"),
    ],
)
def test_a_setting_that_is_not_read(folder: Path, place: str, setting: str, value: object, said: str) -> None:
    name = "scheduler_config.json" if place == "scheduler" else "config.json"
    file = folder / place / name
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {setting: value}))
        with pytest.raises(ValueError, match=said):
            meta_teacher(folder)
    finally:
        file.write_text(before)
