"""A LoRA in any program's names gives the weights computed by hand.

A file that cannot be used is refused by name, and nothing is changed.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from fewstep.backbones.lora import changes_of, fuse, places_in
from fewstep.backbones.original_names import original_names

from .. import pipelines, single_file

RANK, STRENGTH = 2, 0.7
ATTENTION, RESNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "down_blocks.0.resnets.0"
LAYERS = {  # what is trained in these tests: linear layers, convolutions of 1x1 and 3x3, a text encoder's
    "unet": (
        f"{ATTENTION}.to_q",
        f"{ATTENTION}.to_out.0",
        "down_blocks.0.attentions.0.proj_in",
        f"{RESNET}.conv1",
        f"{RESNET}.time_emb_proj",
    ),
    "text_encoder": ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"),
}


@pytest.fixture
def pipe() -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return single_file.sd()


def layer_of(pipe: DiffusionPipeline, part: str, name: str) -> Any:
    """By its bare name: text encoders of transformers before 5.6 put `text_model.` before it."""
    network = getattr(pipe, part)
    return next(m for n, m in network.named_modules() if n.removeprefix("text_model.") == name)


def factors(weight: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random `A [r, in, ...]` and `B [out, r, ...]` of a layer."""
    return torch.randn(RANK, *weight.shape[1:], generator=rng), torch.randn(
        weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=rng
    )


def of(
    pipe: DiffusionPipeline, parts: Mapping[str, tuple[str, ...]] = LAYERS
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return {
        (part, name): factors(layer_of(pipe, part, name).weight, rng) for part, names in parts.items() for name in names
    }


def by_hand(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + scale B A`, a sum over the rank for every output."""
    change = torch.zeros_like(weight)
    for r in range(RANK):
        for out in range(weight.shape[0]):
            change[out] += b[out, r].reshape(()) * a[r]
    return weight + scale * change


def kohya(part: str, name: str) -> str:
    return ("lora_unet_" if part == "unet" else "lora_te_text_model_") + name.replace(".", "_")


def old(name: str) -> str:
    """The layers of an attention were parts of its processor."""
    head, _, tail = name.rpartition(".")
    if tail == "0":
        head, _, tail = head.rpartition(".")
    return f"{head}.processor.{tail}_lora"


NAMES: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "diffusers": lambda part, name: (f"{part}.{name}.lora_A.weight", f"{part}.{name}.lora_B.weight"),
    "diffusers before PEFT": lambda part, name: (f"{part}.{name}.lora.down.weight", f"{part}.{name}.lora.up.weight"),
    "processors": lambda part, name: (f"{part}.{old(name)}.down.weight", f"{part}.{old(name)}.up.weight"),
    "old text encoders": lambda part, name: (
        f"{part}.text_model.{name}.lora_linear_layer.down.weight",
        f"{part}.text_model.{name}.lora_linear_layer.up.weight",
    ),
    "kohya": lambda part, name: (f"{kohya(part, name)}.lora_down.weight", f"{kohya(part, name)}.lora_up.weight"),
    "PEFT": lambda part, name: (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
    "PEFT in memory": lambda part, name: (
        f"base_model.model.{name}.lora_A.default.weight",
        f"base_model.model.{name}.lora_B.default.weight",
    ),
}
ONLY = {"processors": {"unet": LAYERS["unet"][:2]}, "old text encoders": {"text_encoder": LAYERS["text_encoder"]}}
ONLY |= {kind: {"unet": LAYERS["unet"]} for kind in ("PEFT", "PEFT in memory")}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_every_program(kind: str, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    made = of(pipe, ONLY.get(kind, LAYERS))
    tensors: dict[str, Tensor] = {}
    for (part, name), (a, b) in made.items():
        tensors |= dict(zip(NAMES[kind](part, name), (a, b), strict=True))
    alpha = RANK / 4 if kind == "kohya" else float(RANK)
    if kind == "kohya":
        tensors |= {f"{kohya(part, name)}.alpha": torch.tensor(alpha) for part, name in made}
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = {k: by_hand(layer_of(pipe, *k).weight, *made[k], STRENGTH * alpha / RANK).detach() for k in made}
    others = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    assert fuse(pipe, str(tmp_path / "x.safetensors"), STRENGTH) == len(made)
    for k, value in wanted.items():
        torch.testing.assert_close(layer_of(pipe, *k).weight.detach(), value, rtol=0, atol=1e-5)
    touched = {f"{name}.weight" for part, name in made if part == "unet"}
    assert all(torch.equal(p, others[n]) != (n in touched) for n, p in pipe.unet.named_parameters())


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": RANK, "lora_alpha": 8}, 8 / RANK),
        ({"r": RANK, "lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 3}}, 3 / RANK),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {r".*\.to_v": 3}}, 8 / RANK),
    ],
)
@pytest.mark.parametrize("where", ["header", "beside"])
def test_strengths_that_stand_elsewhere(
    settings: dict[str, object], scale: float, where: str, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    """In diffusers' header, with the part's name before each, or in PEFT's file beside the weights."""
    key = ("unet", f"{ATTENTION}.to_q")
    a, b = of(pipe)[key]
    names = NAMES["diffusers" if where == "header" else "PEFT"](*key)
    if where == "header":
        header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
        save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "pytorch_lora_weights.safetensors", header)
    else:
        save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    wanted = by_hand(layer_of(pipe, *key).weight, a, b, scale).detach()
    assert fuse(pipe, str(tmp_path), 1.0) == 1
    torch.testing.assert_close(layer_of(pipe, *key).weight.detach(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_original_names_are_those_of_the_checkpoints(family: str) -> None:
    """Every layer of the U-Net, with the part of its name that says which block it is in."""
    unet = single_file.PIPELINES[family]().unet
    named = dict(original_names(unet))
    layers = [n for n, m in unet.named_modules() if next(iter(m.parameters(recurse=False)), None) is not None]
    assert {n: named[n] for n in layers} == {
        n: single_file.unet_name(f"{n}.weight", unet).removesuffix(".weight") for n in layers
    }


@pytest.mark.parametrize("start", ["lora_unet_{}", "diffusion_model.{}"])
def test_original_names_with_two_text_encoders(start: str, tmp_path: Path) -> None:
    """SDXL as kohya's scripts write it: the original blocks, `te1` and `te2`; and with dots, as ComfyUI does."""
    pipe = pipelines.sdxl()
    parts = {
        "unet": (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
            "up_blocks.0.upsamplers.0.conv",
            "add_embedding.linear_1",
            "mid_block.resnets.1.conv2",
        ),
        "text_encoder": ("encoder.layers.1.self_attn.q_proj",),
        "text_encoder_2": ("encoder.layers.1.self_attn.q_proj",),
    }
    made, original, tensors = of(pipe, parts), dict(original_names(pipe.unet)), dict[str, Tensor]()
    for (part, name), (a, b) in made.items():
        if part == "unet":
            layer = start.format(original[name].replace(".", "_") if start.startswith("lora") else original[name])
        else:
            layer = f"lora_te{1 + (part == 'text_encoder_2')}_text_model_{name.replace('.', '_')}"
        tensors |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = {k: by_hand(layer_of(pipe, *k).weight, *made[k], 1.0).detach() for k in made}
    assert fuse(pipe, str(tmp_path / "x.safetensors"), 1.0) == len(made)
    for k, value in wanted.items():
        torch.testing.assert_close(layer_of(pipe, *k).weight.detach(), value, rtol=0, atol=1e-5)


def test_transformers(tmp_path: Path) -> None:
    """SD3, of which diffusers and PEFT have names alone; both of its first encoders are CLIP's."""
    pipe, name = pipelines.sd3(), "transformer_blocks.0.attn.to_q"
    a, b = factors(layer_of(pipe, "transformer", name).weight, torch.Generator().manual_seed(0))
    for i, start in enumerate(("transformer.", "base_model.model.", "diffusion_model.")):
        save_file({f"{start}{name}.lora_A.weight": a, f"{start}{name}.lora_B.weight": b}, tmp_path / f"{i}.safetensors")
        ((target, change),) = changes_of(pipe, str(tmp_path / f"{i}.safetensors"), 1.0)
        assert (target.part, target.name) == ("transformer", name)
        torch.testing.assert_close(change, b @ a)


def test_half_precision_is_rounded_once(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    key = ("unet", f"{ATTENTION}.to_q")
    a, b = of(pipe)[key]
    save_file(dict(zip(NAMES["diffusers"](*key), (a, b), strict=True)), tmp_path / "x.safetensors")
    pipe.unet.bfloat16()
    wanted = by_hand(layer_of(pipe, *key).weight.float(), a, b, 1.0).bfloat16()
    fuse(pipe, str(tmp_path / "x.safetensors"), 1.0)
    assert torch.eq(layer_of(pipe, *key).weight, wanted).float().mean() > 0.98


LAYER = f"unet.{ATTENTION}.to_q"
FLAT = kohya("unet", f"{ATTENTION}.to_q")
A, B = torch.ones(RANK, 16), torch.ones(16, RANK)
PAIR = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{FLAT}.hada_w1_a": A, f"{FLAT}.hada_w1_b": B}, "holds LoHa, products of two LoRAs: 'lora_unet"),
        ({f"{FLAT}.lokr_w1": A, f"{FLAT}.lokr_w2": B}, "holds LoKr, Kronecker products"),
        (PAIR | {f"{LAYER}.lora_magnitude_vector": A[0]}, "holds DoRA, a LoRA with magnitudes"),
        (PAIR | {f"{FLAT}.dora_scale": A[0]}, "holds DoRA, a LoRA with magnitudes"),
        (PAIR | {f"{FLAT}.diff": A}, "holds whole differences of weights"),
        (PAIR | {f"{FLAT}.diff_b": A[0]}, "holds whole differences of weights"),
        (PAIR | {f"{FLAT}.lora_mid.weight": A}, "holds a LoRA of three factors"),
        (PAIR | {f"{LAYER}.lora_B.bias": A[0]}, "holds a LoRA with biases"),
        (PAIR | {f"{FLAT}.oft_blocks": A}, "holds OFT"),
        (PAIR | {"bundle_emb.word.string_to_param.*": A}, "holds embeddings of new words"),
        (PAIR | {"text_encoders_0": A}, "'text_encoders_0' is no tensor of a LoRA"),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A,
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": B,
            },
            "1 of its 1 layers are not there in this StableDiffusionPipeline (text_encoder, unet), "
            "the first is 'lora_unet_double_blocks_0_img_attn_qkv'",
        ),
        (
            PAIR | {"unet.down_blocks.7.proj.lora_A.weight": A, "unet.down_blocks.7.proj.lora_B.weight": B},
            "1 of its 2 layers are not there",
        ),
        (
            PAIR
            | {
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
                "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": B,
            },
            "1 of its 2 layers are not there",
        ),
        (PAIR | {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B}, "are the same layer"),
        ({f"{LAYER}.lora_A.weight": A}, "has half of a LoRA alone"),
        ({f"{LAYER}.alpha": torch.tensor(1.0)}, "has half of a LoRA alone"),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(RANK, 24), f"{LAYER}.lora_B.weight": B},
            "has factors of [2, 24] and [16, 2], the layer here is [16, 16]",
        ),
        (
            {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": torch.ones(16, 4)},
            "has factors of [2, 16] and [16, 4]",
        ),
        ({f"{LAYER}.lora_A.weight": torch.ones(16), f"{LAYER}.lora_B.weight": B}, "has factors of"),
        ({f"{LAYER}.lora_A.weight": A * float("nan"), f"{LAYER}.lora_B.weight": B}, "are not finite"),
        (PAIR | {f"{LAYER}.alpha": torch.tensor(float("inf"))}, "are not finite"),
        ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": 0 * B}, "changes no weight: all of it is zero"),
        ({}, "it is empty"),
        (
            {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B.long()},
            "is int64 (1 of 2 tensors), not real numbers",
        ),
    ],
)
def test_what_is_refused(tensors: dict[str, Tensor], said: str, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "x.safetensors")
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    with pytest.raises(ValueError, match=r"^--fuse-lora: \S+x.safetensors cannot be fused into this teacher") as error:
        fuse(pipe, str(tmp_path / "x.safetensors"), 1.0)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in pipe.unet.named_parameters())


def test_folders_and_files_that_are_none(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    for place, said in {
        str(tmp_path): "its .safetensors files are none",
        str(tmp_path / "x.bin"): "it is a pickle",
        "./nowhere": "there is no such file or folder",
    }.items():
        with pytest.raises(ValueError, match=f"^--fuse-lora: .* cannot be fused .*{said}"):
            fuse(pipe, place, 1.0)
    for name in ("a", "b"):
        save_file(PAIR, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=r"its .safetensors files are a.safetensors, b.safetensors, of which none is called"
    ):
        fuse(pipe, str(tmp_path), 1.0)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "much"}')
    (tmp_path / "a.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_alpha is 'much', not a number"):
        fuse(pipe, str(tmp_path), 1.0)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}')
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse(pipe, str(tmp_path), 1.0)
    assert len({t.layer for place in places_in(pipe).values() for t in place.targets}) > 50
