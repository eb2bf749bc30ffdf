"""LoRAs of each family under the names of each program: the weights that the file says, or one line that refuses it.

The names stand here as the programs write them: diffusers, kohya's sd-scripts and musubi-tuner, ComfyUI, AI-Toolkit,
OneTrainer, SimpleTuner's LyCORIS and the original codes.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.backbones import krea2
from fewstep.backbones.families import family_of_pipeline
from fewstep.backbones.layouts import shift_first
from fewstep.backbones.lora import Facts, changes_of, fuse, targets_of

from .. import pipelines

RANK, ALPHA = 2, 3.0
DOUBLE, SINGLE = "transformer_blocks.1.attn", "single_transformer_blocks.1"
IMG, TXT = (
    tuple(f"{DOUBLE}.{n}" for n in names)
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
)
LINEAR1 = (*(f"{SINGLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")), f"{SINGLE}.proj_mlp")
MLP = tuple(f"transformer_blocks.1.img_mlp.{n}" for n in ("gate_layer", "proj"))
ZIMAGE = tuple(f"layers.1.attention.{n}" for n in ("to_q", "to_k", "to_v"))
WAN = "blocks.1.attn2.to_out.0"
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
# Family, name in the file without its ending, and diffusers' layers whose rows it has, in turn.
TABLE: list[tuple[str, str, tuple[str, ...]]] = [
    ("sd", f"unet.{UNET}", (UNET,)),
    ("sd", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", (UNET,)),
    ("sd", "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", (UNET,)),
    ("sdxl", f"unet.{UNET}", (UNET,)),
    ("sdxl", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", (UNET,)),
    ("sdxl", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", (UNET,)),
    ("sdxl", "lora_unet_label_emb_0_0", ("add_embedding.linear_1",)),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1", ("text_encoder_2:encoder.layers.0.mlp.fc1",)),
    ("sd3", f"transformer.{IMG[0]}", IMG[:1]),
    ("sd3", "lora_unet_joint_blocks_1_x_block_attn_qkv", IMG),
    ("sd3", "lora_unet_joint_blocks_1_context_block_attn_qkv", TXT),
    ("sd3", "diffusion_model.joint_blocks.0.context_block.mlp.fc2", ("transformer_blocks.0.ff_context.net.2",)),
    ("sd3", "diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1", ("transformer_blocks.0.norm1.linear",)),
    (
        "sd3",
        "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1",
        ("~transformer_blocks.1.norm1_context.linear",),
    ),
    ("sd3", "lora_transformer_transformer_blocks_1_attn_to_q", IMG[:1]),
    (
        "sd3",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ("text_encoder_3:encoder.block.0.layer.0.SelfAttention.q",),
    ),
    ("flux", f"transformer.{SINGLE}.proj_out", (f"{SINGLE}.proj_out",)),
    ("flux", "lora_unet_double_blocks_1_img_attn_qkv", IMG),
    ("flux", "lora_unet_double_blocks_1_txt_attn_qkv", TXT),
    ("flux", "lora_unet_double_blocks_1_txt_attn_proj", (f"{DOUBLE}.to_add_out",)),
    ("flux", "lora_unet_double_blocks_0_img_mod_lin", ("transformer_blocks.0.norm1.linear",)),
    ("flux", "lora_unet_double_blocks_0_img_mlp_0", ("transformer_blocks.0.ff.net.0.proj",)),
    ("flux", "lora_unet_single_blocks_1_linear1", LINEAR1),
    ("flux", "lora_unet_single_blocks_1_linear2", (f"{SINGLE}.proj_out",)),
    ("flux", "lora_unet_single_blocks_1_modulation_lin", (f"{SINGLE}.norm.linear",)),
    ("flux", "lora_te1_text_model_encoder_layers_0_mlp_fc1", ("text_encoder:encoder.layers.0.mlp.fc1",)),
    (
        "flux",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ("text_encoder_2:encoder.block.0.layer.0.SelfAttention.q",),
    ),
    ("flux", "diffusion_model.single_blocks.1.linear1", LINEAR1),
    ("flux", "double_blocks.1.img_attn.qkv", IMG),
    ("flux", "base_model.model.double_blocks.1.img_attn.qkv", IMG),
    ("flux", "diffusion_model.final_layer.adaLN_modulation.1", ("~norm_out.linear",)),
    ("flux", "diffusion_model.vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("flux", "lora_transformer_single_transformer_blocks_1_attn_to_q", LINEAR1[:1]),
    ("flux", "lycoris_transformer_blocks_1_attn_to_q", IMG[:1]),
    ("flux2", f"transformer.{IMG[0]}", IMG[:1]),
    ("flux2", "diffusion_model.double_blocks.1.img_attn.qkv", IMG),
    ("flux2", "lora_unet_double_blocks_1_img_attn_qkv", IMG),
    ("flux2", "lora_unet_single_blocks_1_linear1", (f"{SINGLE}.attn.to_qkv_mlp_proj",)),
    ("flux2", "diffusion_model.final_layer.adaLN_modulation.1", ("~norm_out.linear",)),
    ("flux2-dev", "lora_unet_single_stream_modulation_lin", ("single_stream_modulation.linear",)),
    ("qwenimage", f"transformer.{IMG[0]}", IMG[:1]),
    ("qwenimage", "diffusion_model.transformer_blocks.1.attn.to_q", IMG[:1]),
    ("qwenimage", "lora_unet_transformer_blocks_1_attn_add_k_proj", TXT[1:2]),
    ("qwenimage", "lycoris_transformer_blocks_1_attn_to_q", IMG[:1]),
    ("qwenimage21", f"transformer.{IMG[0]}", IMG[:1]),
    ("qwenimage21", "diffusion_model.transformer_blocks.1.img_mlp.gate_layer", MLP[:1]),
    ("qwenimage21", "lora_unet_transformer_blocks_1_img_mlp_gate_layer", MLP[:1]),
    ("qwenimage21", "diffusion_model.transformer_blocks.1.img_mlp.gate_up", MLP),
    ("zimage", f"transformer.{ZIMAGE[0]}", ZIMAGE[:1]),
    ("zimage", f"diffusion_model.{ZIMAGE[0]}", ZIMAGE[:1]),
    ("zimage", "lora_unet_layers_1_attention_to_q", ZIMAGE[:1]),
    ("zimage", "lora_unet_layers_1_attention_qkv", ZIMAGE),
    ("zimage", "diffusion_model.context_refiner.0.attention.out", ("context_refiner.0.attention.to_out.0",)),
    ("zimage", "diffusion_model.final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    ("krea2", f"transformer.{IMG[0]}", IMG[:1]),
    ("krea2", f"diffusion_model.{IMG[0]}", IMG[:1]),
    ("krea2", "diffusion_model.blocks.1.attn.wq", IMG[:1]),
    ("krea2", "lora_unet_blocks_1_mlp_gate", ("transformer_blocks.1.ff.gate",)),
    ("krea2", "base_model.model.txtfusion.refiner_blocks.0.attn.gate", ("text_fusion.refiner_blocks.0.attn.to_gate",)),
    ("krea2", "diffusion_model.tmlp.2", ("time_embed.linear_2",)),
    ("wan", f"transformer.{WAN}", (WAN,)),
    ("wan", "diffusion_model.blocks.1.cross_attn.o", (WAN,)),
    ("wan", "lora_unet_blocks_1_cross_attn_o", (WAN,)),
    ("wan", "blocks.1.cross_attn.o", (WAN,)),
    ("cogvideox", "transformer.transformer_blocks.1.attn1.to_q", ("transformer_blocks.1.attn1.to_q",)),
    ("cogvideox", "base_model.model.transformer_blocks.1.attn1.to_q", ("transformer_blocks.1.attn1.to_q",)),
]
ENDS = {"kohya": (".lora_down.weight", ".lora_up.weight"), "PEFT": (".lora_A.weight", ".lora_B.weight")}


@cache
def pipe_of(family: str) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pipelines.FAMILIES[family]()


def layer_of(pipe: DiffusionPipeline, said: str) -> tuple[str, Any]:
    """The part of a pipeline and the layer that `PART:NAME` or the denoiser's `NAME` says."""
    part, _, name = said.removeprefix("~").rpartition(":")
    own = part or ("unet" if "unet" in pipe.components else "transformer")
    return own, next(m for n, m in getattr(pipe, own).named_modules() if n.removeprefix("text_model.") == name)


def factors(shape: torch.Size, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, *shape[1:], generator=rng), torch.randn(shape[0], RANK, generator=rng)


@pytest.mark.parametrize(("family", "stem", "layers"), TABLE, ids=[f"{f}-{s}" for f, s, _ in TABLE])
@pytest.mark.parametrize("ends", ENDS)
def test_a_name_is_the_layers_that_the_program_means(
    family: str, stem: str, layers: tuple[str, ...], ends: str, tmp_path: Path
) -> None:
    """With its alpha: each layer takes `alpha / r` times its own rows of B A, in the order of rows that it has here."""
    pipe, rng = pipe_of(family), torch.Generator().manual_seed(1)
    own = [layer_of(pipe, name) for name in layers]
    weights = [layer.weight for _, layer in own]
    down, up = factors(torch.Size([sum(map(len, weights)), *weights[0].shape[1:]]), rng)
    file = {stem + ENDS[ends][0]: down, stem + ENDS[ends][1]: up, f"{stem}.alpha": torch.tensor(ALPHA)}
    save_file(file, tmp_path / "x.safetensors")
    found = changes_of(pipe, str(tmp_path / "x.safetensors"), 0.5)
    assert [(t.part, t.layer) for t, _ in found] == own
    whole = 0.5 * ALPHA / RANK * up @ down
    wanted = torch.cat(whole.chunk(2)[::-1]) if layers[0].startswith("~") else whole
    torch.testing.assert_close(torch.cat([change for _, change in found]), wanted)


MADE = {  # what the makers of a file may write instead of a plain LoRA, and what it is called here
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_w1": "LoKr",
    "hada_w1_a": "LoHa",
    "diff": "whole differences",
}


@pytest.mark.parametrize("family", [f for f in pipelines.FAMILIES if f != "cogvideox-rotary" and "pixart" not in f])
def test_what_is_no_plain_lora_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    stem = next(s for f, s, _ in TABLE if f == family)
    for kind, said in MADE.items():
        file = {f"{stem}.lora_down.weight": torch.ones(2, 2), f"{stem}.{kind}": torch.ones(2)}
        save_file(file, tmp_path / "x.safetensors")
        with pytest.raises(
            ValueError, match=rf"^--fuse-lora: \S+ cannot be fused into this teacher \(it holds .*{said}"
        ):
            changes_of(pipe_of(family), str(tmp_path / "x.safetensors"), 1.0)
    odd = {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(2, 32)}  # XLabs' names
    save_file(odd | {"double_blocks.0.processor.qkv_lora1.up.weight": torch.ones(96, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 of its 1 layers are not there in this \w+Pipeline") as error:
        changes_of(pipe_of(family), str(tmp_path / "x.safetensors"), 1.0)
    assert "\n" not in str(error.value)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe, stem = pipe_of("flux"), "lora_unet_double_blocks_0_img_attn_qkv"
    before = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    for up, said in (
        (torch.ones(64, 2), r"has a factor of \[64, 2\], the layer here has 96 rows"),
        (None, "has half of"),
    ):
        file = {f"{stem}.lora_down.weight": torch.ones(2, 32)} | ({} if up is None else {f"{stem}.lora_up.weight": up})
        save_file(file, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=rf"^--fuse-lora: \S+ cannot be fused into this teacher \('{stem}' {said}"):
            fuse(pipe, str(tmp_path / "x.safetensors"), 1.0)
    both = {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(96, 2)}
    own = "transformer.transformer_blocks.0.attn.to_k"
    both |= {f"{own}.lora_A.weight": torch.ones(2, 32), f"{own}.lora_B.weight": torch.ones(32, 2)}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"'{own}' and '{stem}' are the same layer"):
        fuse(pipe, str(tmp_path / "x.safetensors"), 1.0)
    assert all(torch.equal(p, before[n]) for n, p in pipe.transformer.named_parameters())


class Witness(NamedTuple):
    """A converter of diffusers for whole checkpoints, a pipeline that it is for, and what else it asks for."""

    convert: Callable[..., dict[str, Tensor]]
    pipe: Callable[[], DiffusionPipeline]
    more: Callable[[Any], Iterable[str]] = lambda network: ()


def wide_flux() -> DiffusionPipeline:
    """FLUX.1 of true width, which its converter asks for, without weights."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return FluxPipeline(pipelines.dynamic_scheduler(), *[None] * 5, network)


def flux_norms(network: Any) -> Iterator[str]:
    yield from (f"double_blocks.0.{side}_attn.norm.{n}_norm.scale" for side in ("img", "txt") for n in ("query", "key"))
    yield from (f"single_blocks.0.norm.{n}_norm.scale" for n in ("query", "key"))


WITNESSES = {
    "flux": Witness(convert_flux_transformer_checkpoint_to_diffusers, wide_flux, flux_norms),
    "sd3": Witness(
        convert_sd3_transformer_checkpoint_to_diffusers, lambda: pipe_of("sd3"), lambda network: ["pos_embed"]
    ),
    "zimage": Witness(convert_z_image_transformer_checkpoint_to_diffusers, lambda: pipe_of("zimage")),
}


@pytest.mark.parametrize("family", WITNESSES)
def test_every_row_is_where_diffusers_own_converter_puts_it(family: str) -> None:
    """Every row of every original layer has a number of its own, in a checkpoint and in a LoRA."""
    witness = WITNESSES[family]
    pipe: Any = witness.pipe()
    network: Any = pipe.transformer
    rows = {n: len(m.weight) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = dict(family_of_pipeline(pipe).original_names(network))
    assert family == "zimage" or names.keys() == rows.keys()
    counts, lora, whole, first = dict[str, int](), dict[str, Tensor](), dict[str, Tensor](), 0
    for name, original in names.items():
        counts[original] = counts.get(original, 0) + rows[name]
    for original, count in counts.items():
        numbers = torch.arange(first, first := first + count, dtype=torch.float64)[:, None]
        lora |= {f"{original}.lora_A.weight": torch.ones(1, 1), f"{original}.lora_B.weight": numbers}
        whole |= {f"{original}.weight": numbers, f"{original}.bias": numbers[:, 0]}
    theirs = witness.convert(whole | {n: torch.zeros(1) for n in witness.more(network)}, config={})
    found = list(targets_of(pipe, Facts(lora, {}, {}, False), "transformer"))
    assert {target.name for _, _, target in found} == names.keys()
    for _, own, target in found:
        assert own.up is not None and torch.equal(own.up, theirs[f"{target.name}.weight"])


def test_layers_in_another_order_of_halves() -> None:
    assert shift_first(pipe_of("flux").transformer) == {"norm_out.linear"}
    assert shift_first(pipe_of("sd3").transformer) == {"norm_out.linear", "transformer_blocks.1.norm1_context.linear"}
    assert not shift_first(pipe_of("zimage").transformer) and not shift_first(pipe_of("wan").transformer)
    assert dict(krea2.LAYOUT.names(pipe_of("krea2").transformer))["transformer_blocks.0.ff.up"] == "blocks.0.mlp.up"
