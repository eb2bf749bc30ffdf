"""A finished student put back on its base network, beside the teacher that stays what it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..backbones.base import Backbone, Cond, denoiser
from ..core.prediction import Split
from ..core.solvers import Denoise, free_first
from . import adapters, step_condition
from .step_condition import StepCondition


@dataclass(frozen=True)
class Student:
    """A student that samples. `layers` is empty for a full student, which has a network of its own.

    `vectors`: what is added to the time embedding for each step count or guidance scale, by `condition`; empty where it is told none.
    """

    backbone: Backbone
    network: nn.Module
    layers: tuple[LoraLayer, ...]
    adapter: str
    vectors: Mapping[float, Tensor] = field(default_factory=dict)
    condition: StepCondition | None = None
    head: nn.Module | None = None  # a `core.solvers.Correct`
    free: bool = False  # the first direction is taken without the network

    def denoise(self, cond: Cond, told: float | None = None) -> Denoise:
        """The student without guidance, which is baked in, told its step count or guidance scale (default: its first)."""
        inner = denoiser(self.backbone, self.network, cond)

        def network(x: Tensor, t: Tensor) -> Split:
            adapters.switch(self.layers, self.adapter)
            if self.condition is not None:
                self.condition.active = step_condition.nearest(self.vectors, told or next(iter(self.vectors)))
            try:
                return inner(x, t)
            finally:
                adapters.switch(self.layers, None)
                if self.condition is not None:
                    self.condition.active = None

        return free_first(network, self.backbone.schedule) if self.free else network


def with_vectors(student: Student, vectors: Mapping[float, Tensor]) -> Student:
    """The student told what it is told by these vectors, the default first. Its weights must not say one count already (see `without_fold`)."""
    vectors = {k: v.to(next(student.network.parameters()).device) for k, v in vectors.items()}
    return replace(student, vectors=vectors, condition=step_condition.attach(student.network, student.backbone.time_layer))


def plain_lora(student: Student, count: float, times: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA that is the student of one step count, or guidance scale, by itself, in PEFT's file format, and PEFT's settings for its header.

    `times` are those that this count visits. Whatever alpha it was made with, here it is the rank: the scale is in the weights, so that
    it is right also where headers are not read.
    """
    settings = student.network.peft_config[student.adapter].to_dict()  # type: ignore[union-attr,index]
    made = {k: v.detach().cpu().clone() for k, v in adapters.adapter_state(student.network, student.adapter).items()}
    state = adapters.scaled(made, settings["lora_alpha"] / settings["r"])
    settings |= {"lora_alpha": settings["r"]}
    if not student.vectors:
        return state, settings
    layer = student.backbone.time_layer
    adapters.switch(student.layers, student.adapter)
    try:
        fold = step_condition.folded_lora(
            student.backbone, student.network, student.vectors[count], times, settings["r"], settings["lora_alpha"]
        )
    finally:
        adapters.switch(student.layers, None)
    return state | fold, settings | {"target_modules": sorted({*settings["target_modules"], layer})}


def without_fold(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """A LoRA's weights without those that tell it one step count."""
    return {k: v for k, v in state.items() if not k.startswith(f"{layer}.lora_")}


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
