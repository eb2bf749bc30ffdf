"""Wan draws what its own pipeline draws, at any size, and its students are right in every program."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.backbones.apart import apart
from fewstep.backbones.base import guided
from fewstep.backbones.experts import PARTS
from fewstep.backbones.few_step import drawn
from fewstep.backbones.generate import sample_images
from fewstep.backbones.load import around, load_teacher, pipeline_of
from fewstep.backbones.lora import changes_of, fuse, places_in
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.parts import blocks_of
from fewstep.backbones.schedulers import student_scheduler
from fewstep.backbones.wan import LAYOUT
from fewstep.checks import check_backbone
from fewstep.cli.export import run_export
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.roles.quantized import layers_of
from fewstep.roles.roles import RolesConfig, make_roles

from .. import pipelines

PROMPTS = ["red cat", "a photo of a green house"]


KINDS = ("wan", *pipelines.VARIANTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: pipelines.save(kind, tmp_path_factory.mktemp("wan") / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["wan"]


@pytest.fixture(scope="module", params=KINDS)
def any_folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def stock(folder: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def smaller(folder: Path) -> str:
    """A size that is no square, of one frame."""
    return "64x32x1" if folder.name == "wan-5b" else "32x16x1"


@pytest.mark.parametrize("whole", [True, False])
def test_guided_videos_are_those_of_the_pipeline(any_folder: Path, whole: bool) -> None:
    size = None if whole else smaller(any_folder)
    backbone = load_teacher(any_folder, size=size)
    assert backbone.shape == ((4, 2, 4, 4) if whole else (4, 1, 2, 4))
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    pipe = stock(any_folder)
    pipe.scheduler = student_scheduler(backbone.scheduler_config, [4], "ddim")
    for scale in (1.0, 5.0):
        denoise = guided(backbone, backbone.module, cond, null, Guidance(scale=scale))
        ours = sample_images(backbone, denoise, [0, 1], timegrid.uniform(backbone.schedule, 4))
        theirs = drawn(pipe, PROMPTS, 4, scale, size=size or 0)
        assert ours.shape == theirs.shape and ours.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_process_is_that_of_the_multistep_solver(folder: Path) -> None:
    """UniPC's own noise levels, shifted, lie on the process."""
    backbone = load_teacher(folder)
    scheduler = pipeline_of(backbone).scheduler
    scheduler.set_timesteps(7)
    told = scheduler.sigmas[:-1].double()
    raw = told / (3 - 2 * told)  # the shift undone
    torch.testing.assert_close(backbone.schedule.at(raw), told, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps.double(), (told * 1000).floor(), rtol=0, atol=1.01)
    assert meta_teacher(folder).schedule == backbone.schedule


@pytest.mark.parametrize("kind", pipelines.VARIANTS)
def test_other_sizes_keep_the_protocol(folders: dict[str, Path], kind: str) -> None:
    hollow = meta_teacher(folders[kind])
    assert hollow.fps == (24 if kind == "wan-5b" else 16)  # type: ignore[attr-defined]
    assert type(hollow.module) is type(load_teacher(folders[kind]).module)
    check_backbone(load_teacher(folders[kind]), PROMPTS)


def a_student(folder: Path, final: Path, share: bool = True) -> torch.Tensor:
    *_, step = fewstep.distill(
        load_teacher(folder, size=smaller(folder)),
        fewstep.TDM(steps=2, warmup=0, guidance=3.0),
        PROMPTS,
        train=fewstep.TrainConfig(iterations=1, batch=2, lr=0.02),
        roles=fewstep.RolesConfig(lora=share, rank=2, exclude=()),
    )
    with step.roles.averaged():
        step.student().write(final)
    return fewstep.sample(step, PROMPTS, [0, 1])


Made = tuple[Path, Path, torch.Tensor]


@pytest.fixture(scope="module")
def student(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A base, a student of another size than the pipeline's own, and what the student draws."""

    @cache
    def make(kind: str) -> Made:
        final = tmp_path_factory.mktemp("student") / kind / "final"
        return folders[kind], final, a_student(folders[kind], final)

    return make


@pytest.fixture(scope="module", params=["wan", pytest.param("wan-5b", marks=pytest.mark.slow), "wan-a14b"])
def made(request: pytest.FixtureRequest, student: Callable[[str], Made]) -> Made:
    return student(str(request.param))


@pytest.mark.parametrize("original", [False, True])
def test_a_stock_pipeline_loads_the_lora(made: Made, original: bool) -> None:
    """Under diffusers' names, and under the original ones that ComfyUI has; of two networks each has a file."""
    base, final, own = made
    size = smaller(base)
    assert fewstep.load_student(final).card.size == size
    pipe = stock(base)
    before = drawn(pipe, PROMPTS, 2, size=size)
    if original:
        files = sorted(f.name for f in final.glob("*-lora.safetensors"))  # high before low
        assert len(files) == 1 + (base.name == "wan-a14b")
    else:
        files = ["pytorch_lora_weights.safetensors"] + ["pytorch_lora_weights_2.safetensors"] * (
            base.name == "wan-a14b"
        )
    for file, second in zip(files, (False, True), strict=False):
        pipe.load_lora_weights(str(final), weight_name=file, load_into_transformer_2=second)
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(final, subfolder="scheduler")
    found = drawn(pipe, PROMPTS, 2, size=size)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 1e-3
    width, height, frames = size.split("x")
    said = (final / "README.md").read_text()
    assert f"height={height}, width={width}, num_frames={frames}" in said
    assert ('weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True' in said) == (
        len(files) > 1
    )


def test_a_student_is_the_same_everywhere(made: Made, tmp_path: Path) -> None:
    """Loaded, as a pipeline on its base, and as a pipeline of its own."""
    base, final, own = made
    torch.testing.assert_close(fewstep.sample(fewstep.load_student(final), PROMPTS, [0, 1]), own, rtol=0, atol=1e-4)
    seeds = [torch.Generator().manual_seed(i) for i in (0, 1)]
    few = fewstep.load(stock(base), final)(PROMPTS, generator=seeds, output_type="pt").frames
    torch.testing.assert_close(few, own, rtol=0, atol=1e-4)
    run_export(str(final), tmp_path / "whole", "pipeline", None, None)
    pipe = stock(tmp_path / "whole")
    assert (pipe.transformer_2 is not None) == (base.name == "wan-a14b")
    torch.testing.assert_close(drawn(pipe, PROMPTS, 2, size=smaller(base)), own, rtol=0, atol=1e-4)
    run_export(str(final), tmp_path / "merged", "merged", None, None)


@pytest.mark.slow
def test_two_networks_with_all_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    own = a_student(folders["wan-a14b"], tmp_path / "final", share=False)
    assert {p.name for p in tmp_path.glob("final/transformer*")} == {"transformer", "transformer_2"}
    again = fewstep.sample(fewstep.load_student(tmp_path / "final"), PROMPTS, [0, 1])
    torch.testing.assert_close(again, own, rtol=0, atol=1e-4)


def test_each_sample_goes_to_the_network_of_its_time(folders: dict[str, Path]) -> None:
    backbone = load_teacher(folders["wan-a14b"])
    cond, x = backbone.encode(PROMPTS * 2), torch.randn(4, *backbone.shape)
    t = torch.tensor([0.9, 0.1, 0.8, 0.79], dtype=torch.float64)
    pair: Any = backbone.module
    with torch.no_grad():
        both = backbone.predict(pair, x, t, cond)
        for network, rows in ((pair.transformer, [0, 2]), (pair.transformer_2, [1, 3])):
            alone = backbone.predict(network, x[rows], t[rows], {k: v[rows] for k, v in cond.items()})
            torch.testing.assert_close(both[rows], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["wan", "wan-a14b"])
def test_blocks_that_are_computed_again_have_the_same_gradients(folders: dict[str, Path], kind: str) -> None:
    """Of a batch on both sides of the boundary."""
    teacher = load_teacher(folders[kind])
    cond, x = teacher.encode(PROMPTS), torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    t, found = torch.tensor([0.9, 0.5], dtype=torch.float64), []
    for again in (False, True):
        roles = make_roles(apart(teacher), RolesConfig(rank=2, checkpointing=again))
        value = roles.denoise("student", cond)(x, t).x0.square().mean()
        found.append(torch.autograd.grad(value, list(roles.trained["student"].values()), materialize_grads=True))
        assert {n.partition(".")[0] for n in roles.trained["student"]} >= ({"blocks"} if kind == "wan" else set(PARTS))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))
    assert sum(bool(g.any()) for g in found[0]) >= len(found[0]) // 2


def test_two_networks_are_not_sharded(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"train\.shard: of two networks a process calls the one of its samples' times"
    ):
        blocks_of(load_teacher(folders["wan-a14b"]).module)


def test_the_time_embeddings_of_two_networks_are_not_rounded() -> None:
    """As the library keeps them in single precision, so does a base of fewer bits."""
    pipe = pipelines.wan("2.2-A14B")
    config = {**pipe.transformer.config, "num_attention_heads": 8, "ffn_dim": 128}
    pipe.register_modules(**{part: WanTransformer3DModel.from_config(config) for part in PARTS})
    backbone = around(pipe, "wide")
    names = {n for n, m in backbone.module.named_modules() if any(m is layer for layer in layers_of(backbone))}
    assert "transformer_2.blocks.0.attn1.to_q" in names and not any("time_embedder" in n for n in names)


def test_a_lora_of_one_of_two_networks(student: Callable[[str], Made], tmp_path: Path) -> None:
    """A file is for the network that its name says; a name that says neither is refused."""
    base, final, _ = student("wan-a14b")
    pipe = stock(base)
    high, low = sorted(final.glob("*-lora.safetensors"))
    assert {t.part for t, _ in changes_of(pipe, str(high), 1)} == {"transformer"}
    assert {t.part for t, _ in changes_of(pipe, str(low), 1)} == {"transformer_2"}
    (tmp_path / "style.safetensors").write_bytes(low.read_bytes())
    with pytest.raises(
        ValueError, match=r"its name does not say for which it is\); rename it so that it has high_noise"
    ):
        changes_of(pipe, str(tmp_path / "style.safetensors"), 1)
    fused = load_teacher(f"{base} + {high} + {low}", size=smaller(base))
    loaded = fewstep.load_student(final)
    x, t = torch.randn(2, *fused.shape), torch.tensor([1.0, 0.5], dtype=torch.float64)
    cond = fused.encode(PROMPTS)
    with torch.no_grad():
        theirs = fused.predict(fused.module, x, t, cond)
    ours = loaded.denoise(cond)(x, t)
    torch.testing.assert_close(theirs, ours.eps - ours.x0, rtol=1e-4, atol=1e-4)


def test_every_layer_has_an_original_name(student: Callable[[str], Made], tmp_path: Path) -> None:
    """A LoRA under the names of ComfyUI or musubi's scripts is fused as under diffusers' own."""
    base, final, _ = student("wan")
    pipe = stock(base)
    names = dict(LAYOUT.names(pipe.transformer))
    linear = {n for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == names.keys() - {"patch_embedding"} and len(set(names.values())) == len(names)
    own = {f"{t.part}.{t.name}": c for t, c in changes_of(pipe, str(final / "pytorch_lora_weights.safetensors"), 1)}
    file = next(final.glob("*-lora.safetensors"))
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
        (
            "32x24x5",
            r"allowed for wan are widths in multiples of 16, heights of 16, and 4 n \+ 1 frames, up to 32x32x5",
        ),
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
