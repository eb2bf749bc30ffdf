"""A U-Net's LoRA under the names of kohya's scripts.

Every program for Stable Diffusion reads these names.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

ENDINGS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
# A layer of the original programs with shift and scale the other way round than diffusers has them.
SHIFT_FIRST = "final_layer.adaLN_modulation.1"
OUTSIDE = {  # layers outside of blocks: diffusers' names and the original code's
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def kohya(state: Mapping[str, Tensor], alpha: float, original: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Rename a LoRA's layers from PEFT's names to kohya's.

    `layer.lora_A.weight` becomes `lora_unet_layer.lora_down.weight`, and `lora_B` becomes `lora_up`. Next to
    every layer stands `alpha`, so that no header is needed.

    kohya's scripts call the layers of Stable Diffusion 1 and 2 as diffusers does, and those of SDXL as the
    `original` code does (see `original_names`). Programs that know both names take only the original names
    for all of SDXL.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        ending = next(e for e in ENDINGS if key.endswith(e))
        layer = key.removesuffix(ending)
        stem = "lora_unet_" + (layer if original is None else original[layer]).replace(".", "_")
        named[stem + ENDINGS[ending]] = tensor
        named[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return named


def native(state: Mapping[str, Tensor], original: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename a LoRA's layers from diffusers' names to the original program's.

    `layer.lora_A.weight` becomes `diffusion_model.ORIGINAL.lora_A.weight`. Alpha is the rank. Layers that are
    one in the original, such as queries, keys and values, are its rows in turn: A are stacked, and B are the
    blocks of a diagonal. Where the original has shift before scale, the halves of B change places.
    """
    together: dict[str, list[str]] = {}
    for layer in original:
        if f"{layer}.lora_A.weight" in state:
            together.setdefault(original[layer], []).append(layer)
    named: dict[str, Tensor] = {}
    for name, layers in together.items():
        down, up = ([state[f"{n}.{half}.weight"] for n in layers] for half in ("lora_A", "lora_B"))
        whole = up[0] if len(up) == 1 else torch.block_diag(*up)
        if name.endswith(SHIFT_FIRST):
            whole = torch.cat(whole.chunk(2)[::-1])
        named[f"diffusion_model.{name}.lora_A.weight"] = torch.cat(down)
        named[f"diffusion_model.{name}.lora_B.weight"] = whole.contiguous()
    return named


def renamed(state: Mapping[str, Tensor], original: Mapping[str, str]) -> bool:
    """Return whether `native` can name a LoRA.

    Every layer has an original name, and of layers that are one in the original the LoRA has all or none.
    """
    layers, parts = layers_of(state), Counter(original.values())
    here = Counter(original.get(n, "") for n in layers)
    return bool(original) and "" not in here and all(count == parts[name] for name, count in here.items())


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers that a LoRA changes, sorted.

    `names` are those of its tensors in PEFT's file format.
    """
    return sorted({k.removesuffix(e) for k in names for e in ENDINGS if k.endswith(e)})


def original_names(layers: Collection[str], network: Collection[str]) -> dict[str, str]:
    """Return what Stable Diffusion's original code calls a U-Net's layers.

    `layers` are names of diffusers' U-Net; `network` has the names of all modules of the U-Net.
    """
    depth = 1 + max((int(n.split(".")[3]) for n in network if n.startswith("down_blocks.0.resnets.")), default=0)
    return {layer: OUTSIDE.get(layer) or _in_block(layer, depth, network) for layer in layers}


def _in_block(layer: str, depth: int, network: Collection[str]) -> str:
    """Return the original name of a layer inside a block.

    A level has `depth` residual blocks in the down path and one more in the up path, counted through all
    levels; attention is the second part of each block.
    """
    side, *rest = layer.split(".")
    level = 0 if side == "mid_block" else int(rest.pop(0))
    kind, index, inner = rest[0], int(rest[1]), ".".join(rest[2:])
    inner = RESNET.get(inner, inner) if kind == "resnets" else inner
    part = int(kind == "attentions")
    if side == "mid_block":
        return f"middle_block.{1 if part else 2 * index}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (depth + 1)}.0.op"
    if side == "down_blocks":
        return f"input_blocks.{1 + level * (depth + 1) + index}.{part}.{inner}"
    if kind == "upsamplers":
        last = 1 + any(n.startswith(f"up_blocks.{level}.attentions.") for n in network)
        return f"output_blocks.{level * (depth + 1) + depth}.{last}.{inner}"
    return f"output_blocks.{level * (depth + 1) + index}.{part}.{inner}"
