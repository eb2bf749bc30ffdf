"""The step count as a condition of student and fake score.

The condition is one vector per step count, zero at first, added to the time embedding (TDM sec. 3.2). A
guidance scale is conditioned on in the same manner (LCM, arXiv 2310.04378).

For one step count the vector is a constant and can be folded into the network: into the bias of the time
embedding's last layer, or into its weight or a LoRA of rank one, which gives the same vector at every time that
this step count uses, and loads wherever a LoRA loads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..backbones.base import Backbone

GAIN = 10.0  # vector / parameter: the vector has to grow to the size of an embedding at a LoRA's learning rate


@dataclass(eq=False)
class StepCondition:
    """Forward hook that adds the `active` vector to a layer's output.

    Without an active vector the output does not change.
    """

    active: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.active is None else output + self.active.to(output)


def attach(network: nn.Module, layer: str) -> StepCondition:
    """Attach a condition to `network.layer`.

    `layer` is the last layer of the time embedding. The condition has no effect until a vector is active. An
    adapter that is injected into the layer afterwards removes the condition, so inject adapters first. Raises
    ValueError for a network without a time layer.
    """
    condition = StepCondition()
    time_layer(network, layer).register_forward_hook(condition)
    return condition


def time_layer(network: nn.Module, layer: str) -> nn.Module:
    """Return the layer whose output is the time embedding.

    Raises ValueError if the backbone names none.
    """
    if not layer:
        raise ValueError(
            "method.steps: several step counts need a network that can be conditioned on them; "
            "name its last time-embedding layer in Denoiser(time_layer=...), or set method.condition=false"
        )
    return network.get_submodule(layer)


def width(network: nn.Module, layer: str) -> int:
    """Return the length of the time embedding."""
    weight = time_layer(network, layer).weight
    assert isinstance(weight, Tensor)
    return len(weight)


def vectors(counts: Sequence[float], table: Tensor) -> dict[float, Tensor]:
    """Return the vector of each step count, `GAIN` times the table's row."""
    return {count: GAIN * row for count, row in zip(counts, table, strict=True)}


def vector(counts: Sequence[float], table: Tensor, count: float) -> Tensor:
    """Return the vector of the trained step count nearest in ratio."""
    return GAIN * table[counts.index(_nearest(counts, count))]


def put(table: Tensor, known: Sequence[Tensor]) -> None:
    """Write vectors into the table, the inverse of `vectors`."""
    with torch.no_grad():
        table.copy_(torch.stack(list(known)) / GAIN)


def nearest(known: Mapping[float, Tensor], count: float) -> Tensor:
    """Return the vector of the trained step count nearest in ratio."""
    return known[_nearest(list(known), count)]


def _nearest(counts: Sequence[float], count: float) -> float:
    return min(counts, key=lambda k: abs(math.log(k / count)))


def folded_lora(
    backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor, rank: int, alpha: float
) -> dict[str, Tensor]:
    """Return the vector as a LoRA of the time layer.

    The LoRA is in PEFT's file format and satisfies `alpha/rank B A h(t) = vector` at each of the `times [N]`.
    The solution is `alpha/rank B A = vector u^T` with the smallest u for which `u . h(t) = 1`; rows and
    columns beyond the first are zero.

    The network has to serve as the student during the call. The effect of other layers on h is included.
    """
    layer, u = backbone.time_layer, direction(backbone, network, times)
    a, b = torch.zeros(rank, len(u)), torch.zeros(len(vector), rank)
    a[0], b[:, 0] = u.float(), vector.detach().float().cpu() * rank / alpha
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


def direction(backbone: Backbone, network: nn.Module, times: Tensor) -> Tensor:
    """Return the smallest direction u with `u . h(t) = 1`.

    At each of the `times [N]`, and at other times that the network looks at by itself. h(t) is the input of the time
    layer. Float64, on the CPU.
    """
    seen: list[Tensor] = []
    handle = time_layer(network, backbone.time_layer).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    cond = {k: v.expand(len(times), *v.shape[1:]) for k, v in backbone.encode([""]).items()}
    device = next(network.parameters()).device
    with torch.no_grad():
        backbone.predict(network, torch.zeros(len(times), *backbone.shape, device=device), times.to(device), cond)
    handle.remove()
    inputs = seen[0].double().cpu().flatten(0, -2)
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    return torch.linalg.lstsq(inputs, ones, driver="gelsd").solution[:, 0]


@contextmanager
def folded(backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor) -> Iterator[None]:
    """Fold the vector into the time layer within the block.

    Within the block the network is the student of that step count by itself.
    """
    weight, change = _fold_of(backbone, network, vector, times)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def fold(backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor) -> None:
    """Fold the vector into the time layer permanently."""
    weight, change = _fold_of(backbone, network, vector, times)
    with torch.no_grad():
        weight.add_(change)


def unfold(backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor, adapter: str = "") -> None:
    """Remove the folded vector from a loaded student.

    The vector is the time layer's part of this adapter, or part of the time layer's bias or weight.
    """
    found = time_layer(network, backbone.time_layer)
    with torch.no_grad():
        if isinstance(found, LoraLayer):
            found.lora_B[adapter].weight.zero_()
        else:
            weight, change = _fold_of(backbone, network, vector, times)
            weight.sub_(change)


def _fold_of(backbone: Backbone, network: nn.Module, vector: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameter that takes a folded vector, and its change.

    The bias of the time layer, or its weight where it has none: the weight gives the vector at the `times`
    alone.
    """
    layer = time_layer(network, backbone.time_layer)
    if isinstance(layer.bias, Tensor):
        return layer.bias, vector.to(layer.bias)
    assert isinstance(layer.weight, Tensor)
    u = direction(backbone, network, times)
    return layer.weight, torch.outer(vector.detach().double().cpu(), u).to(layer.weight)


def without_fold(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return a LoRA's weights without the part that folds one condition."""
    return {k: v for k, v in state.items() if not k.startswith(f"{layer}.lora_")}
