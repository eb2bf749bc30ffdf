"""A trial of LoRA on a network of one's own.

Does training reach the network, and is the merged network the same?
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..backbones.apart import apart
from ..backbones.base import Backbone
from ..backbones.modules import LORA, coarsest, dtype_of, seen_dtypes
from ..backbones.own_network import CLOSE, question
from ..backbones.parts import DiffusersBackbone
from ..roles.adapters import Adapter, adapter_layers, adapter_parameters, add_adapter, merge, targets
from ..roles.roles import RolesConfig

NAME, STRENGTH = "trial", 0.3  # of a layer's weights, as which a trial changes them
MOST = 2**28  # weights of a network that is copied for the trial


def require_adaptable(teacher: Backbone, config: RolesConfig) -> None:
    """Check that a network of one's own can be trained.

    The network computes with gradient, and takes LoRA as its layers do.

    An adapter that says something must reach the output with and without gradient alike, and merged into the
    weights it must give the same output. Raises ValueError with one line that names the layer.
    """
    if isinstance(teacher, DiffusersBackbone) or (config.lora and not config.rank):
        return
    backbone, network = apart(teacher), f"teacher: the network of {teacher.name}"
    module, adapter = backbone.module, None
    if config.lora:
        names = targets(module, config.targets, config.exclude)
        add_adapter(module, NAME, 1, 1.0, names, seed=0)
        adapter = Adapter(tuple(adapter_layers(module)), NAME)
        _fill(adapter)
        adapter.switch(True)
        asked = adapter_parameters(module, NAME)
    else:
        asked = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    for p in asked.values():
        p.requires_grad_(True)
    x, t, cond = question(backbone, [""])

    def answer(network: nn.Module) -> Tensor:
        return backbone.predict(network, x, t, cond)

    with torch.enable_grad(), seen_dtypes(module) as seen:
        m = answer(module)
        if not m.requires_grad:
            raise ValueError(
                f"{network} computes without gradients, so that nothing can be trained; "
                "take torch.no_grad and detach out of its forward, and have it call its layers"
            )
        try:
            with nullcontext() if adapter is None else _off(adapter):  # as a backward pass may find it
                reached = torch.autograd.grad(m.square().sum(), list(asked.values()), allow_unused=True)
        except RuntimeError as error:  # of torch.utils.checkpoint
            said = " ".join(str(error).split())[:80]
            raise ValueError(
                f"{network} computes a part again for its gradients ({said}); "
                "take torch.utils.checkpoint out of its forward, and set roles.checkpointing=true"
            ) from error
    if not any(g is not None and bool(g.any()) for g in reached):
        raise ValueError(
            f"{network} gives none of its {len(asked)} trained tensors a gradient; have it call its layers"
        )
    limit = CLOSE.get(coarsest(dtype_of(module), *seen), CLOSE[torch.float32]) * max(1.0, float(m.detach().abs().max()))

    def same(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= limit

    with torch.no_grad():
        if not same(answer(module), m.detach()):
            raise ValueError(
                f"{network} answers otherwise where no gradient is asked for, so that what is sampled is not what is "
                "trained; have it call the same layers in both cases"
            )
        if adapter is None or sum(p.numel() for n, p in module.named_parameters() if LORA not in n) > MOST:
            return
        if not same(_merged(module, answer), m.detach()):
            _blame(module, adapter, answer, same)
            raise ValueError(f"{network} is another when LoRA is merged into its weights; set roles.lora=false")


@contextmanager
def _off(adapter: Adapter) -> Iterator[None]:
    """Switch the adapter off for a while."""
    adapter.switch(False)
    try:
        yield
    finally:
        adapter.switch(True)


def _fill(adapter: Adapter) -> None:
    """Give every layer a LoRA that changes its weight.

    The change is `STRENGTH` of the weight's standard deviation.
    """
    rng = torch.Generator().manual_seed(0)
    for layer in adapter.layers:
        weight = layer.get_base_layer().weight
        assert isinstance(weight, Tensor)
        size = STRENGTH * float(weight.detach().float().square().mean().sqrt())
        for part, scale in ((layer.lora_A[adapter.name], 1.0), (layer.lora_B[adapter.name], size)):
            values = part.weight.data
            values.copy_(torch.randn(values.shape, generator=rng).to(values) * scale)


def _merged(module: nn.Module, answer: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return the output of a copy with the LoRA merged."""
    whole = copy.deepcopy(module)
    merge(whole, NAME)
    return answer(whole)


def _blame(
    module: nn.Module, adapter: Adapter, answer: Callable[[nn.Module], Tensor], same: Callable[[Tensor, Tensor], bool]
) -> None:
    """Find the first layer whose LoRA cannot be merged.

    Raises ValueError that names the layer.
    """
    second = [layer.lora_B[adapter.name].weight.data.clone() for layer in adapter.layers]
    for layer in adapter.layers:
        layer.lora_B[adapter.name].weight.data.zero_()
    names = {id(m): n for n, m in module.named_modules()}
    for layer, values in zip(adapter.layers, second, strict=True):
        weight = layer.lora_B[adapter.name].weight.data
        weight.copy_(values)
        if not same(_merged(module, answer), answer(module)):
            name = names[id(layer)]
            raise ValueError(
                f"roles.exclude: the weight of {name} is used outside its layer, so that LoRA on it cannot be merged; "
                f"add {name!r} to roles.exclude, or set roles.lora=false"
            )
        weight.zero_()
