"""Other programs find every layer of Stable Diffusion 1.5 and XL.

The names follow these programs' own rules, on networks of true shape.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from fewstep.backbones.original_names import original_names
from fewstep.roles.adapters import targets
from fewstep.roles.roles import RolesConfig
from fewstep.student.kohya import kohya, layers_of

from .programs import UNREAD

SD15: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def network(shape: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**shape)


def state_of(net: UNet2DConditionModel, layers: list[str]) -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 without content on these layers."""
    with torch.device("meta"):
        return {f"{n}.lora_{part}.weight": torch.empty(1, 1) for n in layers for part in "AB"}


def original_layers(depth: list[int], middle: int, outer: list[int]) -> Iterator[tuple[str, str]]:
    """Yield (name, name in diffusers) of the original code's layers inside blocks.

    There are two residual blocks a level down, three up, counted through. `depth` are the transformer blocks of each
    level down, `outer` of each level up, 0 for none.
    """
    inside = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    attention = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]

    def resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in inside.items())

    def transformer(ours: str, theirs: str, blocks: int) -> Iterator[tuple[str, str]]:
        inner = ["proj_in", "proj_out", *(f"transformer_blocks.{i}.{x}" for i in range(blocks) for x in attention)]
        yield from ((f"{ours}.{x}", f"{theirs}.{x}") for x in inner)

    place = 1
    for level, blocks in enumerate(depth):
        for i in range(2):
            yield from resnet(f"input_blocks.{place}.0", f"down_blocks.{level}.resnets.{i}")
            if blocks:
                yield from transformer(f"input_blocks.{place}.1", f"down_blocks.{level}.attentions.{i}", blocks)
            place += 1
        if level < len(depth) - 1:
            yield f"input_blocks.{place}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            place += 1
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield from transformer("middle_block.1", "mid_block.attentions.0", middle)
    yield from resnet("middle_block.2", "mid_block.resnets.1")
    place = 0
    for level, blocks in enumerate(outer):
        for i in range(3):
            yield from resnet(f"output_blocks.{place}.0", f"up_blocks.{level}.resnets.{i}")
            if blocks:
                yield from transformer(f"output_blocks.{place}.1", f"up_blocks.{level}.attentions.{i}", blocks)
            if i == 2 and level < len(outer) - 1:
                yield f"output_blocks.{place}.{2 if blocks else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            place += 1


@pytest.mark.parametrize(
    ("shape", "rule", "count"),
    [(SD15, ([1, 1, 1, 0], 1, [0, 1, 1, 1]), 278), (SDXL, ([0, 2, 10], 10, [10, 2, 0]), 788)],
    ids=["sd15", "sdxl"],
)
def test_every_layer_that_is_trained_has_its_name_in_the_original_code(
    shape: dict[str, Any], rule: tuple[list[int], int, list[int]], count: int
) -> None:
    net = network(shape)
    layers = targets(net, "all", RolesConfig().exclude)
    assert len(layers) == count
    theirs = {ours: name for name, ours in original_layers(*rule)}
    names = dict(original_names(net))
    assert {n: names[n] for n in layers} == {n: theirs[n] for n in layers}
    named = kohya(state_of(net, layers), 1.0, names)
    assert {k.split(".")[0] for k in named} == {f"lora_unet_{theirs[n].replace('.', '_')}" for n in layers}
    assert len(named) == 3 * count


@pytest.mark.parametrize("shape", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_layers_that_some_programs_leave_out_are_not_trained_by_default(shape: dict[str, Any]) -> None:
    net = network(shape)
    every, own = targets(net, "all"), targets(net, "all", RolesConfig().exclude)
    outside = {n for n in every if n.split(".")[0] not in ("down_blocks", "mid_block", "up_blocks")}
    assert set(every) - set(own) == outside
    assert set(UNREAD) == {n for n in outside if not n.startswith("add_embedding")}
    names = dict(original_names(net))  # whoever trains them all the same finds them again
    assert {names[n] for n in UNREAD} == {"input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2"}


def test_kohyas_names_hold_the_same_numbers_and_their_own_alpha() -> None:
    a, b = torch.rand(8, 3), torch.rand(5, 8)
    layer = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    assert layers_of(state) == [layer]
    named = kohya(state, 8.0)
    stem = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    assert set(named) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert torch.equal(named[f"{stem}.lora_down.weight"], a)
    assert torch.equal(named[f"{stem}.lora_up.weight"], b)
    assert float(named[f"{stem}.alpha"]) == 8.0
