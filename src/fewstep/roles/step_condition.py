"""The step count as a condition of student and fake score: a vector per count, zero at first, added to the time embedding. TDM sec. 3.2.

A guidance scale is told the same way (LCM, arXiv 2310.04378).

For one count the vector is a constant, so it folds into the network: into the bias of the time embedding's last layer, or into a
LoRA of rank one that gives the same vector at every time that this count visits, and so loads wherever a LoRA loads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..backbones.base import Backbone

GAIN = 10.0  # a vector is 10 times its parameter: it has to grow to the size of an embedding at a LoRA's learning rate


@dataclass(eq=False)
class StepCondition:
    """Adds `active`, if there is one, to the output of the layer that it is attached to."""

    active: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.active is None else output + self.active.to(output)


def attach(network: nn.Module, layer: str) -> StepCondition:
    """A condition on `network.layer`, the last layer of its time embedding; it does nothing until a vector is active.

    Adapters that are injected into that layer afterwards lose it, so inject them first. Raises ValueError for a network without it.
    """
    condition = StepCondition()
    time_layer(network, layer).register_forward_hook(condition)
    return condition


def time_layer(network: nn.Module, layer: str) -> nn.Module:
    """The layer whose output is the time embedding. Raises ValueError where the backbone names none."""
    if not layer:
        raise ValueError(
            "method.steps: several step counts need a network that can be told them; name its last time-embedding layer in Denoiser(time_layer=...), or set method.condition=false"
        )
    return network.get_submodule(layer)


def width(network: nn.Module, layer: str) -> int:
    """Length of the time embedding."""
    weight = time_layer(network, layer).weight
    assert isinstance(weight, Tensor)
    return len(weight)


def vectors(counts: Sequence[float], table: Tensor) -> dict[float, Tensor]:
    """What is added for each count: `GAIN` times its row of the table."""
    return {count: GAIN * row for count, row in zip(counts, table, strict=True)}


def put(table: Tensor, known: Sequence[Tensor]) -> None:
    """Inverse of `vectors`: write them into the table."""
    with torch.no_grad():
        table.copy_(torch.stack(list(known)) / GAIN)


def nearest(known: Mapping[float, Tensor], count: float) -> Tensor:
    """The vector of this count, or of the trained one nearest in ratio."""
    return known[min(known, key=lambda k: abs(math.log(k / count)))]


def folded_lora(
    backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor, rank: int, alpha: float
) -> dict[str, Tensor]:
    """The vector as a LoRA of the time layer, in PEFT's file format: `alpha/rank B A h(t) = vector` at each of the `times [N]`.

    `alpha/rank B A = vector u^T` with the smallest u for which `u . h(t) = 1`; rows and columns beyond the first are zero. The network has to
    be the student at the moment. Other layers' effect on h is included.
    """
    layer, seen = backbone.time_layer, []
    handle = time_layer(network, layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    cond = {k: v.expand(len(times), *v.shape[1:]) for k, v in backbone.encode([""]).items()}
    device = next(network.parameters()).device
    with torch.no_grad():
        backbone.predict(network, torch.zeros(len(times), *backbone.shape, device=device), times.to(device), cond)
    handle.remove()
    u = torch.linalg.lstsq(
        seen[0].double().cpu(), torch.ones(len(times), 1, dtype=torch.float64), driver="gelsd"
    ).solution[:, 0]
    a, b = torch.zeros(rank, len(u)), torch.zeros(len(vector), rank)
    a[0], b[:, 0] = u.float(), vector.detach().float().cpu() * rank / alpha
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


@contextmanager
def folded_bias(network: nn.Module, layer: str, vector: Tensor) -> Iterator[None]:
    """Within it the vector is part of the time layer's bias: the network is the student of that count by itself."""
    bias = _bias(network, layer)
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.add_(vector.to(bias))
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def fold(network: nn.Module, layer: str, vector: Tensor) -> None:
    """Make the vector part of the time layer's bias for good."""
    with torch.no_grad():
        _bias(network, layer).add_(vector.to(_bias(network, layer)))


def unfold(network: nn.Module, layer: str, vector: Tensor, adapter: str = "") -> None:
    """Take the folded vector out of a loaded student: the time layer's part of this adapter, or the vector in its bias."""
    with torch.no_grad():
        if isinstance(found := time_layer(network, layer), LoraLayer):
            found.lora_B[adapter].weight.zero_()
        else:
            _bias(network, layer).sub_(vector.to(_bias(network, layer)))


def _bias(network: nn.Module, layer: str) -> Tensor:
    bias = time_layer(network, layer).bias
    assert isinstance(bias, Tensor)
    return bias


def without_fold(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return a LoRA's weights without those that fold in one condition value."""
    return {k: v for k, v in state.items() if not k.startswith(f"{layer}.lora_")}
