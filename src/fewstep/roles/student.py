"""A finished student put back on its base network, beside the teacher that stays what it was."""

from collections.abc import Mapping
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..backbones.base import Backbone, Cond, denoiser
from ..core.prediction import Split
from ..core.solvers import Denoise
from . import adapters


@dataclass(frozen=True)
class Student:
    """A student that samples. `layers` is empty for a full student, which has a network of its own."""

    backbone: Backbone
    network: nn.Module
    layers: tuple[LoraLayer, ...]
    adapter: str

    def denoise(self, cond: Cond) -> Denoise:
        """The student without guidance, which is baked in."""
        inner = denoiser(self.backbone, self.network, cond)

        def denoise(x: Tensor, t: Tensor) -> Split:
            adapters.switch(self.layers, self.adapter)
            try:
                return inner(x, t)
            finally:
                adapters.switch(self.layers, None)

        return denoise


def with_lora(backbone: Backbone, state: Mapping[str, Tensor], rank: int, alpha: float) -> Student:
    """Attach a LoRA in PEFT's file format to the backbone's own network, beside those that are there.

    Raises ValueError when it does not fit.
    """
    module = backbone.module
    adapter = adapters.unused_name(module, "student")
    names = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    known = {n.replace(".base_layer", "") for n, _ in module.named_modules()}
    if missing := [n for n in names if n not in known]:
        raise ValueError(
            f"student: the base network has no layer {missing[0]} ({len(missing)} of {len(names)} are missing); load it on the base named in its fewstep.json"
        )
    adapters.add_adapter(module, adapter, rank, alpha, names, seed=0)
    adapters.load_adapter(module, adapter, state)
    layers = tuple(adapters.adapter_layers(module))
    adapters.switch(layers, None)
    return Student(backbone, module.requires_grad_(False).eval(), layers, adapter)
