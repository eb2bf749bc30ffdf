"""A U-Net's LoRA under the names of kohya's scripts.

Every program for Stable Diffusion reads these names.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

ENDINGS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya(state: Mapping[str, Tensor], alpha: float, original: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Rename a LoRA's layers from PEFT's names to kohya's.

    `layer.lora_A.weight` becomes `lora_unet_layer.lora_down.weight`, and `lora_B` becomes `lora_up`. Next to
    every layer stands `alpha`, so that no header is needed.

    kohya's scripts call the layers of Stable Diffusion 1 and 2 as diffusers does, and those of SDXL as the
    `original` code does (see `backbones.original_names`). Programs that know both names take only the original names
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


def native(
    state: Mapping[str, Tensor], original: Mapping[str, str], swapped: Collection[str] = ()
) -> dict[str, Tensor]:
    """Rename a LoRA's layers from diffusers' names to the original program's.

    `layer.lora_A.weight` becomes `diffusion_model.ORIGINAL.lora_A.weight`. Alpha is the rank. Layers that are
    one in the original, such as queries, keys and values, are its rows in turn: A are stacked, and B are the
    blocks of a diagonal. Of `swapped` layers the original has shift before scale: the halves of B change places.
    """
    together: dict[str, list[str]] = {}
    for layer in original:
        if f"{layer}.lora_A.weight" in state:
            together.setdefault(original[layer], []).append(layer)
    named: dict[str, Tensor] = {}
    for name, layers in together.items():
        down, up = ([state[f"{n}.{half}.weight"] for n in layers] for half in ("lora_A", "lora_B"))
        whole = up[0] if len(up) == 1 else torch.block_diag(*up)
        if layers[0] in swapped:
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


def layers_of(state: Mapping[str, Tensor]) -> list[str]:
    """Return the layers that a LoRA changes, sorted.

    The LoRA is in PEFT's file format.
    """
    return sorted({k.removesuffix(e) for k in state for e in ENDINGS if k.endswith(e)})
