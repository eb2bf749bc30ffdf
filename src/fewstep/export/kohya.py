"""A U-Net's LoRA under the names that kohya's scripts, ComfyUI and A1111 know."""

from collections.abc import Mapping

import torch
from torch import Tensor

ENDINGS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """PEFT's `layer.lora_A.weight` as `lora_unet_layer.lora_down.weight`, and so on; `alpha` beside every layer, so that no header is needed."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        ending = next(e for e in ENDINGS if key.endswith(e))
        layer = "lora_unet_" + key.removesuffix(ending).replace(".", "_")
        named[layer + ENDINGS[ending]] = tensor
        named[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return named
