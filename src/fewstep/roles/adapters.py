"""LoRA adapters of one frozen network.

The functions choose the layers that carry adapters and switch adapters without touching `requires_grad`.
PEFT's own `set_adapter` and `disable_adapters` toggle `requires_grad`, which silently drops the gradient of a
student whose forward pass came before another role's forward pass. The switch in this module changes only
which adapter the layers add. All layers read one list of names, so a switch costs the same for any network.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ..backbones.kinds import Unfilled
from ..backbones.modules import without_fast_path
from .sharding import shard_like

TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (nn.Linear, nn.Conv2d),
    "linear": (nn.Linear,),
    "conv": (nn.Conv2d,),
    "attention": (nn.Linear,),
}
DEFAULT_RANK, LEAST_RANK = 32, 4
FEW = 16  # layers that PEFT gets at a time
FITTING = 0.25  # largest share of a network's weights


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a network.

    `layers` are the layers that carry adapters, and `name` is the LoRA's name in these layers.
    """

    layers: tuple[LoraLayer, ...]
    name: str

    def switch(self, on: bool) -> None:
        """Switch this adapter on, or all adapters off."""
        switch(self.layers, self.name if on else None)


def plain_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a network by name, without adapters.

    The network may carry adapters by now.
    """
    found, inside = dict[str, nn.Module](), "\0"
    for name, part in module.named_modules():
        if name.startswith(inside):
            continue
        adapted = isinstance(part, LoraLayer)
        inside = f"{name}." if adapted else inside
        found[name] = part.get_base_layer() if adapted else part
    return found


def targets(module: nn.Module, kind: str, skip: Sequence[str] = ()) -> list[str]:
    """Return the names of the layers that can carry LoRA.

    `kind` is all, linear, conv or attention. Names containing a `skip` are left out, and so are layers whose
    LoRA could not be merged: convolutions with groups, dilation or another padding than zeros, and weights that
    are tied, computed from others, or read by nn.MultiheadAttention. Raises ValueError for an unknown kind, or a
    network without such layers.
    """
    if kind not in TARGETS:
        raise ValueError(f"roles.targets: got {kind!r}, allowed are {', '.join(TARGETS)}")
    plain = plain_layers(module)
    able = _able(plain)
    layers = [
        (n, m) for n, m in plain.items() if isinstance(m, TARGETS[kind]) and n in able and not any(s in n for s in skip)
    ]
    if kind == "attention":
        layers = [
            (n, m)
            for n, m in layers
            if n.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "query", "key", "value") or n.endswith("to_out.0")
        ]
    if not layers:
        raise ValueError(
            f"roles.targets: the network has no {kind} layers to carry LoRA; "
            "choose another kind or roles.lora=false for full weights"
        )
    return [n for n, _ in layers]


def _able(plain: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the layers whose LoRA can be merged.

    Such a LoRA changes a weight that belongs to the layer alone.
    """
    holders = Counter(id(p) for m in plain.values() for p in m.parameters(recurse=False))
    return {
        n
        for n, m in plain.items()
        if not is_parametrized(m)
        and "weight" not in vars(m)  # computed before each call
        and holders[id(dict(m.named_parameters(recurse=False)).get("weight"))] <= 1
        and not (isinstance(m, nn.Conv2d) and not _plain(m))
        and not isinstance(m, NonDynamicallyQuantizableLinear)  # attention reads its weight
    }


def _plain(conv: nn.Conv2d) -> bool:
    """Return whether PEFT's LoRA of a convolution is a convolution alike."""
    return conv.groups == 1 and conv.padding_mode == "zeros" and set(conv.dilation) == {1}


def lora_weights(module: nn.Module, names: Sequence[str], rank: int) -> int:
    """Return the number of weights of a LoRA of this rank.

    The number is rank (in + out) per layer; for a convolution, `in` is the number of inputs of the kernel.
    """
    plain = plain_layers(module)
    layers = [plain[n] for n in names]
    return sum(
        rank * (math.prod(m.weight.shape[1:]) + m.weight.shape[0])
        for m in layers
        if isinstance(m, nn.Linear | nn.Conv2d)
    )


def fitting_rank(module: nn.Module, names: Sequence[str]) -> int:
    """Return the rank that fits the size of a network.

    The rank is `DEFAULT_RANK`, halved until a LoRA has at most `FITTING` of the network's weights. On small
    networks a larger LoRA is slower and no better.
    """
    whole, rank = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n), DEFAULT_RANK
    while rank > LEAST_RANK and lora_weights(module, names, rank) > FITTING * whole:
        rank //= 2
    return rank


def add_adapter(module: nn.Module, name: str, rank: int, alpha: float, names: Sequence[str], seed: int) -> None:
    """Inject a LoRA adapter without effect (B = 0).

    The adapter is in single precision, in the named layers. The base weights do not change. The network calls its
    layers from then on: a layer's weight alone lacks the adapter. In a network of fake (meta) tensors it has meta
    tensors. PEFT gets a few layers at a time: in a whole network it looks at every module for every layer.
    """
    without_fast_path(module)
    parts, wanted = dict(module.named_modules()), set(names)
    layers = [n for n in parts if n in wanted]
    if not any(isinstance(m, LoraLayer) for m in parts.values()):
        module.requires_grad_(False)
    first_weight = next(module.parameters())
    # PEFT asks a network's first parameter for the device. A few rounded layers alone may have none.
    tells_device = nn.Parameter(first_weight.detach().new_empty(0), requires_grad=False)
    hollow = isinstance(first_weight, FakeTensor)
    place = torch.device("meta") if hollow else nullcontext()
    with torch.random.fork_rng(devices=[]), place, Unfilled() if hollow else nullcontext():
        torch.manual_seed(seed)
        for first in range(0, len(layers), FEW):
            some = layers[first : first + FEW]
            box = nn.Module()
            vars(box).update({k: v for k, v in vars(module).items() if k.startswith("is_loaded_in_")})  # PEFT asks
            for i, path in enumerate(some):
                box.add_module(f"layer_{i}", parts[path])
            box.register_parameter("tells_device", tells_device)
            own = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*box._modules], init_lora_weights=True)
            inject_adapter_in_model(own, box, adapter_name=name)
            for path, layer in zip(some, box._modules.values(), strict=True):
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, layer)
        for p in adapter_parameters(module, name).values():
            p.data = p.data.float()  # small updates vanish in half precision, whatever the dtype of the base
    others = [n for n in plain_layers(module) if n not in wanted]
    least = _find_minimal_target_modules(layers, others)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=least, init_lora_weights=True)
    vars(module).setdefault("peft_config", {})[name] = config  # where PEFT keeps it


def adapter_layers(module: nn.Module) -> list[LoraLayer]:
    """Return the layers that carry adapters, for `switch`.

    The layers add what they added before, and from now on read it in one list that all of them share. The search
    is slow, so callers keep the layers.
    """
    layers = [m for m in module.modules() if isinstance(m, LoraLayer)]
    shared = [] if not layers or layers[0].disable_adapters else list(layers[0].active_adapters)
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = shared, False
    return layers


def remove_adapters(module: nn.Module, stems: Sequence[str]) -> None:
    """Remove the adapters that earlier runs left in a network.

    Adapters are called `stem` or `stem_2`; the plain layers are put back. An earlier holder of a removed
    adapter gets an error from `switch`.

    Raises ValueError for any other adapter: another adapter belongs to the teacher, whose weights have to be
    the network's own.
    """
    carrying = {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}
    if foreign := {name for m in carrying.values() for name in m.lora_A if name.partition("_")[0] not in stems}:
        raise ValueError(
            f"teacher: its network carries the adapter {min(foreign)}; "
            "fuse it into the weights first: pipe.fuse_lora(), then pipe.unload_lora_weights()"
        )
    for path, layer in carrying.items():
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
        layer.lora_A.clear()
    vars(module).pop("peft_config", None)


def merge(module: nn.Module, name: str) -> None:
    """Merge an adapter into the base weights and remove all adapters.

    A network without adapters is left unchanged.
    """
    for layer in adapter_layers(module):
        layer.merge(adapter_names=[name])
    remove_adapters(module, (name,))


def unused_name(module: nn.Module, stem: str) -> str:
    """Return an adapter name that the network does not carry.

    The name is `stem`, or the first free one of `stem_2`, `stem_3`, ...
    """
    taken = {name for m in module.modules() if isinstance(m, LoraLayer) for name in m.lora_A}
    return stem if stem not in taken else next(name for i in count(2) if (name := f"{stem}_{i}") not in taken)


def switch(layers: Sequence[LoraLayer], name: str | None) -> None:
    """Make `name` the active adapter; None activates the base network.

    The `layers` are those of `adapter_layers`. Raises ValueError if the adapter was removed meanwhile.
    """
    if name is not None and layers and not any(name in layer.lora_A for layer in layers):
        raise ValueError(
            "student: its network has gone to another run on the same teacher; load the teacher again to keep both"
        )
    for layer in layers[:1]:  # the others read the same list
        layer._active_adapter[:] = [] if name is None else [name]


@contextmanager
def keep_input_dtype(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Keep the dtype of LoRA inputs within the block.

    For autocast, which casts weights instead, so that no second copy of every input is kept.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def adapter_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of one adapter by full name.

    The order is fixed.
    """
    return {n: p for n, p in module.named_parameters() if f".{name}." in n or n.endswith(f".{name}")}


def adapter_state(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the weights of one adapter in PEFT's file format.

    The keys are `layer.lora_A.weight` and `layer.lora_B.weight`.
    """
    return get_peft_model_state_dict(module, adapter_name=name)


def scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return a LoRA with `factor` times the effect."""
    return {k: v * factor if factor != 1 and ".lora_B" in k else v for k, v in state.items()}


def load_adapter(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Load weights in PEFT's file format into adapter `name`.

    Raises ValueError if the weights do not fit the adapter's layers or shapes.
    """
    own = adapter_state(module, name)
    if other := next((k for k in state if k in own and own[k].shape != state[k].shape), None):
        raise ValueError(
            f"student: its LoRA has {other} of shape {list(state[other].shape)}, here it is "
            f"{list(own[other].shape)}; set roles.rank to that of the file"
        )
    result = set_peft_model_state_dict(module, dict(state), adapter_name=name)
    placed = adapter_state(module, name)
    if result.unexpected_keys or set(placed) != set(state):
        odd = sorted(set(placed) ^ set(state))[:3]
        raise ValueError(
            f"student: its LoRA does not fit this network (first keys in doubt: {', '.join(odd)}); "
            "load it on the base named in its fewstep.json, begin from it with its own roles.targets and "
            "roles.exclude"
        )


@contextmanager
def swapped_parameters(parameters: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange the values of parameters with those of `others` within the block.

    Memory changes hands and nothing is copied, except for sharded parameters, which go one by one, and for
    others of another dtype.
    """
    kept = {n: p.detach().clone() for n, p in parameters.items() if p.dtype != others[n].dtype}
    same = [(p, others[n]) for n, p in parameters.items() if n not in kept]
    try:
        assign({n: parameters[n] for n in kept}, others)
        _exchange(same)
        yield
    finally:
        assign({n: parameters[n] for n in kept}, kept)
        _exchange(same)


def _exchange(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for p, other in pairs:
            if isinstance(p, DTensor):  # FSDP knows its parts by their memory
                before = p.detach().clone()
                p.copy_(other)
                other.copy_(before)
            else:
                p.data, other.data = other.data, p.data
    torch.clear_autocast_cache()


def assign(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    A sharded parameter receives this process's part. Autocast caches casts of parameters by identity and does
    not notice changed values, so the cache is cleared.
    """
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(shard_like(tensors[n], p))
    torch.clear_autocast_cache()


def attach_adapter(module: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> Adapter:
    """Attach a LoRA in PEFT's file format to a network.

    The LoRA is added next to existing adapters and is switched off. Raises ValueError if the LoRA does not
    fit.
    """
    name = unused_name(module, "student")
    names = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    known = {n.replace(".base_layer", "") for n, _ in module.named_modules()}
    if missing := [n for n in names if n not in known]:
        raise ValueError(
            f"student: the base network has no layer {missing[0]} ({len(missing)} of {len(names)} are missing); "
            "load it on the base named in its fewstep.json"
        )
    add_adapter(module, name, rank, alpha, names, seed=0)
    load_adapter(module, name, state)
    adapter = Adapter(tuple(adapter_layers(module)), name)
    adapter.switch(False)
    return adapter


def plain_state(module: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a LoRA with the scale in the weights, and PEFT's settings.

    The weights are in PEFT's file format, and the settings are for the file's header. Whatever alpha the LoRA
    was made with, the returned alpha is the rank, so the LoRA is also right where headers are not read.
    """
    settings = module.peft_config[name].to_dict()  # type: ignore[union-attr,index]
    state = {k: v.detach().cpu().clone() for k, v in adapter_state(module, name).items()}
    return scaled(state, settings["lora_alpha"] / settings["r"]), settings | {"lora_alpha": settings["r"]}
