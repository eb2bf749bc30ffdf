"""A denoiser in a file of its own is read whole, beside the pipeline that is named with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, WanPipeline
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.backbones.conformance import distilled_already
from fewstep.backbones.denoiser_file import decoded
from fewstep.backbones.families import family_of_pipeline
from fewstep.backbones.layouts import shift_first
from fewstep.backbones.load import around, load_teacher, pipeline_of
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.wan import LAYOUT

from .. import pipelines, tiny

OTHERS = {"scale_shift_table": "modulation", "norm2": "norm3"}  # names of Wan that are no layers with a LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("wan", tmp_path_factory.mktemp("beside") / "wan")


def original(pipe: WanPipeline) -> dict[str, Tensor]:
    """The network's weights under the names of Wan's own program."""
    layers, named = dict(LAYOUT.names(pipe.transformer)), dict[str, Tensor]()
    for name, tensor in pipe.transformer.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in layers:
            named[f"{layers[layer]}.{kind}"] = tensor
        elif name == "scale_shift_table":
            named["head.modulation"] = tensor
        else:
            own = name.replace("attn1", "self_attn").replace("attn2", "cross_attn")
            for ours, theirs in OTHERS.items():
                own = own.replace(f".{ours}", f".{theirs}")
            named[own] = tensor
    assert len(named) == len(pipe.transformer.state_dict())
    return named


def eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI stores scaled float8."""
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith("weight"):
            scale = tensor.abs().max() / 448
            found |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): scale}
        else:
            found[name] = tensor
    return found


def test_every_layout_gives_the_same_network(folder: Path, tmp_path: Path) -> None:
    """The base's own weights are not read: here they are others."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = pipelines.wan()
    wanted = other.transformer.state_dict()
    plain, named = dict(wanted), original(other)
    save_file(plain, tmp_path / "diffusers.safetensors")
    save_file({f"model.diffusion_model.{k}": v.clone() for k, v in named.items()}, tmp_path / "comfy.safetensors")
    halves = list(named)[::2], list(named)[1::2]
    for i, half in enumerate(halves):
        save_file({k: named[k].clone() for k in half}, tmp_path / f"part-{i}.safetensors")
    shards = {k: f"part-{i}.safetensors" for i, half in enumerate(halves) for k in half}
    (tmp_path / "sharded.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for file in ("diffusers.safetensors", "comfy.safetensors", "sharded.safetensors.index.json"):
        teacher = load_teacher(f"{tmp_path / file}@{folder}")
        assert type(pipeline_of(teacher)) is WanPipeline and teacher.shape == (4, 2, 4, 4)
        found = teacher.module.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
        assert meta_teacher(f"{tmp_path / file}@{folder}").shape == teacher.shape
    save_file(eight_bits(named), tmp_path / "fp8.safetensors")
    found = load_teacher(f"{tmp_path / 'fp8.safetensors'}@{folder}").module.state_dict()
    assert all((found[k] - wanted[k]).abs().max() <= wanted[k].abs().max() / 16 for k in wanted)
    layer = "blocks.0.attn1.to_q.weight"
    assert (found[layer] - wanted[layer]).abs().max() > 0


RENAMED = {  # what the original programs call norms, which are no layers
    "flux2": {
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight": r"single_blocks.\1.norm.\2",
        r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight": r"double_blocks.\1.img_attn.norm.\2",
        r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight": r"double_blocks.\1.txt_attn.norm.\2",
        r"norm\.q$": "norm.query_norm.scale",
        r"norm\.k$": "norm.key_norm.scale",
    },
    "zimage": {r"attention\.norm_([qk])": r"attention.\1_norm"},
}


def as_its_makers_write_it(family: str, pipe: Any) -> dict[str, Tensor]:
    """The network's weights under the original names: queries, keys and values are one tensor."""
    network, own = pipe.transformer, dict(pipe.transformer.state_dict())
    rows, swapped = dict[str, list[Tensor]](), shift_first(network)
    for name, original in family_of_pipeline(pipe).original_names(network):
        for kind in ("weight", "bias"):
            if (tensor := own.pop(f"{name}.{kind}", None)) is not None:
                tensor = torch.cat(tensor.chunk(2)[::-1]) if name in swapped else tensor
                rows.setdefault(f"{original}.{kind}", []).append(tensor)
    for name, tensor in own.items():
        for pattern, other in RENAMED.get(family, {}).items():
            name = re.sub(pattern, other, name)
        rows[name] = [tensor]
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in rows.items()}


@pytest.mark.parametrize(
    "family", ["flux2", "zimage", "qwenimage", pytest.param("qwenimage21", marks=pytest.mark.slow)]
)
def test_a_network_alone_of_todays_families(family: str, tmp_path: Path) -> None:
    """As ComfyUI keeps it, in one file, in shards with an index, and in scaled float8."""
    folder = pipelines.save(family, tmp_path / family)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other: Any = pipelines.FAMILIES[family]()
    wanted, named = other.transformer.state_dict(), as_its_makers_write_it(family, other)
    assert named.keys() != wanted.keys() or family.startswith("qwenimage")
    save_file({f"model.diffusion_model.{k}": v.clone() for k, v in named.items()}, tmp_path / "whole.safetensors")
    halves = list(named)[::2], list(named)[1::2]
    for i, half in enumerate(halves):
        save_file({k: named[k].clone() for k in half}, tmp_path / f"part-{i}.safetensors")
    shards = {k: f"part-{i}.safetensors" for i, half in enumerate(halves) for k in half}
    (tmp_path / "shards.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for file in ("whole.safetensors", "shards.safetensors.index.json"):
        found = load_teacher(f"{tmp_path / file}@{folder}", size=pipelines.SIZES[family]).module.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    save_file(eight_bits({k: v.contiguous() for k, v in named.items()}), tmp_path / "fp8.safetensors")
    found = load_teacher(f"{tmp_path / 'fp8.safetensors'}@{folder}", size=pipelines.SIZES[family]).module.state_dict()
    assert all((found[k] - wanted[k]).abs().max() <= wanted[k].abs().max() / 8 for k in wanted)


def test_a_student_knows_its_base_by_file_and_pipeline(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "wan.safetensors"
    save_file(original(WanPipeline.from_pretrained(folder)), file)
    teacher = load_teacher(f"{file}@{folder}")
    *_, step = fewstep.distill(
        teacher,
        fewstep.TDM(steps=2, warmup=0),
        ["red cat"],
        train=fewstep.TrainConfig(iterations=1, batch=1, lr=0.02),
        roles=fewstep.RolesConfig(rank=2),
    )
    with step.roles.averaged():
        step.student().write(tmp_path / "final")
    student = fewstep.load_student(tmp_path / "final")
    assert student.card.base == f"{file}@{folder}"
    torch.testing.assert_close(fewstep.sample(student, ["red cat"], [0]), fewstep.sample(step, ["red cat"], [0]))
    assert "its network is in a file of its own" in (tmp_path / "final" / "README.md").read_text()
    graph = json.loads((tmp_path / "final" / "comfyui-workflow.json").read_text())
    assert graph["1"]["inputs"]["unet_name"] == "wan.safetensors"


def test_two_networks_are_two_files(tmp_path: Path) -> None:
    folder = pipelines.save("wan-a14b", tmp_path / "pair")
    pipe = WanPipeline.from_pretrained(folder)
    high, low = tmp_path / "x_high_noise.safetensors", tmp_path / "x_low_noise.safetensors"
    save_file({k: v.clone() for k, v in pipe.transformer.state_dict().items()}, high)
    with pytest.raises(ValueError, match=r"has two networks, and x_high_noise\.safetensors is one; put the file"):
        load_teacher(f"{high}@{folder}")
    save_file({k: v.clone() for k, v in pipe.transformer_2.state_dict().items()}, low)
    with pytest.raises(ValueError, match=r"x_low_noise\.safetensors is one; name the file for high noise"):
        load_teacher(f"{low}@{folder}")
    found, own = load_teacher(f"{high}@{folder}").module.state_dict(), load_teacher(folder).module.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head.head.bias": None}, "lacks 'proj_out.bias'"),
        ({"blocks.9.ffn.0.bias": torch.zeros(2)}, "left over, which this network does not have"),
        ({"head.head.bias": torch.zeros(3)}, "has another shape of 'proj_out.bias'"),
        ({"head.head.bias": torch.full((16,), float("nan"))}, "not finite"),
        ({"blocks.0.ffn.0.weight.absmax": torch.zeros(2)}, "8 bits or fewer, in a way"),
    ],
)
def test_a_file_that_is_not_whole(folder: Path, tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
    named = original(WanPipeline.from_pretrained(folder)) | change
    save_file({k: v for k, v in named.items() if v is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^teacher: .*{said}") as error:
        load_teacher(f"{tmp_path / 'x.safetensors'}@{folder}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["wan", "sd3", "zimage", "flux2"])
def test_a_tensor_more_or_under_another_name_is_named(family: str, tmp_path: Path) -> None:
    """Diffusers' names with a fault stay diffusers' names: no other layout is looked for."""
    folder, file = pipelines.save(family, tmp_path / family), tmp_path / "x.safetensors"
    own = {k: v.clone() for k, v in load_teacher(folder).module.state_dict().items()}
    last = max(own)
    for tensors, said in (
        (own | {"foo.bar": torch.zeros(2)}, r"has 'foo\.bar' \(1 tensor"),
        ({("foo.bar" if k == last else k): v for k, v in own.items()}, rf"lacks '{re.escape(last)}' \(1 tensor"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=said):
            load_teacher(f"{file}@{folder}")


def test_a_network_alone_needs_its_pipeline(folder: Path, tmp_path: Path) -> None:
    save_file(original(WanPipeline.from_pretrained(folder)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="or their network alone as FILE@PIPELINE"):
        load_teacher(tmp_path / "x.safetensors")


def test_scales_for_rows_and_other_bits() -> None:
    codes = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    rows = torch.tensor([[1.0], [0.5]])
    for scale, wanted in ((torch.tensor(2.0), 2 * codes), (rows, codes * rows)):
        stored = {"a.weight": codes.to(torch.float8_e4m3fn), "a.weight_scale": scale, "b": codes}
        found = decoded(stored, torch.float32)
        assert found.keys() == {"a.weight", "b"} and torch.equal(found["a.weight"], wanted)
    assert torch.equal(decoded({"a.weight": codes.to(torch.float8_e5m2)}, torch.bfloat16)["a.weight"].float(), codes)
    eight, one = codes.to(torch.float8_e4m3fn), torch.ones(1)
    for stored, said in (
        ({"a.weight": codes.to(torch.int8), "a.weight_scale": one}, r"it keeps a\.weight in int8, with scales"),
        ({"a.weight": codes.to(torch.int8)}, r"it keeps a\.weight in int8, without a scale"),
        ({"a.weight": eight, "a.scale_weight": one, "b.scale_weight": one}, r"has the scale 'b\.scale_weight', and no"),
        ({"a.weight": eight, "a.scale_weight": one, "b.weight": eight}, r"'b\.weight' in float8 without a scale, and"),
    ):
        with pytest.raises(ValueError, match=said):
            decoded(stored, torch.float32)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/Z-Image-Turbo", "its name says turbo"),
        ("sdxl_lightning_4step_unet.safetensors", "its name says 4step and its name says lightning"),
        ("FLUX.1-schnell", "schnell"),
        ("x/Wan2.1-T2V-14B-StepDistill", "stepdistill"),
        ("hyperrealistic", ""),
        ("owner/Wan2.1-T2V-1.3B-Diffusers", ""),
    ],
)
def test_a_teacher_that_is_a_student_is_said_to_be_one(name: str, said: str) -> None:
    found = distilled_already(tiny.pipeline(), name)
    assert said in found and bool(said) == bool(found)


def test_other_signs_of_a_student() -> None:
    """A guidance input, a scheduler of few steps, and `is_distilled`, with which a pipeline is refused as a base."""
    assert "its network takes the guidance scale as an input" in distilled_already(pipelines.flux(), "x")
    pipe = tiny.pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert "its scheduler is of the kind that few-step models have, LCMScheduler" in distilled_already(pipe, "x")
    for family in ("flux2", "krea2"):
        turbo = pipelines.FAMILIES[family]()
        turbo.register_to_config(is_distilled=True)
        assert "its model_index.json says is_distilled" in distilled_already(turbo, "x")
        with pytest.raises(ValueError, match=r"^base: x: .*it is a few-step model already; pass the base model"):
            around(turbo, "x")
