"""LoRA adapters of one frozen network: which layers carry them, and a switch that never touches `requires_grad`.

PEFT's own `set_adapter` and `disable_adapters` toggle `requires_grad`, which silently drops the gradient of a student whose
forward pass came before another role's. The switch here changes nothing but which adapter the layers add.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..backbones.modules import without_fast_path
from .sharding import shard_like

TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (nn.Linear, nn.Conv2d),
    "linear": (nn.Linear,),
    "conv": (nn.Conv2d,),
    "attention": (nn.Linear,),
}
DEFAULT_RANK, LEAST_RANK = 32, 4
FITTING = 0.25  # of a network's weights


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a network: the layers that carry adapters, and its name in them."""

    layers: tuple[LoraLayer, ...]
    name: str

    def switch(self, on: bool) -> None:
        """Add this adapter to the layers' outputs, or none."""
        switch(self.layers, self.name if on else None)


def plain_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name all modules of a network as they are without adapters, which may be there by now."""
    found, inside = dict[str, nn.Module](), "\0"
    for name, part in module.named_modules():
        if name.startswith(inside):
            continue
        adapted = isinstance(part, LoraLayer)
        inside = f"{name}." if adapted else inside
        found[name] = part.get_base_layer() if adapted else part
    return found


def targets(module: nn.Module, kind: str, skip: Sequence[str] = ()) -> list[str]:
    """Full names of the layers of `kind` (all, linear, conv, attention) that can carry LoRA. Names containing a `skip` are left out."""
    if kind not in TARGETS:
        raise ValueError(f"roles.targets: got {kind!r}, allowed are {', '.join(TARGETS)}")
    layers = [(n, m) for n, m in plain_layers(module).items() if isinstance(m, TARGETS[kind]) and not any(s in n for s in skip)]
    if kind == "attention":
        layers = [
            (n, m) for n, m in layers if n.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "query", "key", "value") or n.endswith("to_out.0")
        ]
    if not layers:
        raise ValueError(
            f"roles.targets: the network has no {kind} layers to carry LoRA; choose another kind or roles.lora=false for full weights"
        )
    return [n for n, _ in layers]


def lora_weights(module: nn.Module, names: Sequence[str], rank: int) -> int:
    """How many weights a LoRA of this rank has: rank (in + out) a layer, of a convolution the inputs of its kernel."""
    plain = plain_layers(module)
    layers = [plain[n] for n in names]
    return sum(rank * (math.prod(m.weight.shape[1:]) + m.weight.shape[0]) for m in layers if isinstance(m, nn.Linear | nn.Conv2d))


def fitting_rank(module: nn.Module, names: Sequence[str]) -> int:
    """`DEFAULT_RANK`, halved until a LoRA has at most `FITTING` of the network's weights; on small networks more is slower and no better."""
    whole, rank = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n), DEFAULT_RANK
    while rank > LEAST_RANK and lora_weights(module, names, rank) > FITTING * whole:
        rank //= 2
    return rank


def add_adapter(module: nn.Module, name: str, rank: int, alpha: float, names: Sequence[str], seed: int) -> None:
    """Inject a zero-effect LoRA adapter (B = 0), in single precision, into the named layers. The base weights stay as they are.

    The network calls its layers from then on, whose weights alone are not all of them.
    """
    without_fast_path(module)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters on one network are the point
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), init_lora_weights=True), module, adapter_name=name
        )
        for p in adapter_parameters(module, name).values():
            p.data = p.data.float()  # small updates vanish in half precision, whatever the base is in


def adapter_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers that carry adapters, to be found once and switched often."""
    return [m for m in module.modules() if isinstance(m, LoraLayer)]


def remove_adapters(module: nn.Module, stems: Sequence[str]) -> None:
    """Put the plain layers back where earlier runs left adapters called `stem` or `stem_2`; whoever held these is told by `switch`.

    Raises ValueError when there are others: they are part of the teacher, which has to be the network's own weights.
    """
    carrying = {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}
    if foreign := {name for m in carrying.values() for name in m.lora_A if name.partition("_")[0] not in stems}:
        raise ValueError(
            f"teacher: its network carries the adapter {min(foreign)}; fuse it into the weights first: pipe.fuse_lora(), then pipe.unload_lora_weights()"
        )
    for path, layer in carrying.items():
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
        layer.lora_A.clear()
    vars(module).pop("peft_config", None)


def merge(module: nn.Module, name: str) -> None:
    """Add the adapter to the weights it stands beside, and take all adapters out; nothing happens without any."""
    for layer in adapter_layers(module):
        layer.merge(adapter_names=[name])
    remove_adapters(module, (name,))


def unused_name(module: nn.Module, stem: str) -> str:
    """`stem`, or `stem_2`, `stem_3`, ... where the network already carries an adapter of that name."""
    taken = {name for m in module.modules() if isinstance(m, LoraLayer) for name in m.lora_A}
    return stem if stem not in taken else next(name for i in count(2) if (name := f"{stem}_{i}") not in taken)


def switch(layers: Sequence[LoraLayer], name: str | None) -> None:
    """Make `name` the adapter that the layers add; None is the bare base network. Raises ValueError when it was taken out since."""
    if name is not None and layers and not any(name in layer.lora_A for layer in layers):
        raise ValueError("student: its network has gone to another run on the same teacher; load the teacher again to keep both")
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


@contextmanager
def keep_input_dtype(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Within it LoRA take their inputs as they come: for autocast, which casts weights instead, so that no second copy of every input is kept."""
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def adapter_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The trainable tensors of one adapter by full name, in a fixed order."""
    return {n: p for n, p in module.named_parameters() if f".{name}." in n or n.endswith(f".{name}")}


def adapter_state(module: nn.Module, name: str) -> dict[str, Tensor]:
    """One adapter's weights in PEFT's file format: `layer.lora_A.weight`, `layer.lora_B.weight`."""
    return get_peft_model_state_dict(module, adapter_name=name)


def scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same LoRA with `factor` times its effect."""
    return {k: v * factor if factor != 1 and ".lora_B" in k else v for k, v in state.items()}


def load_adapter(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Put weights in PEFT's file format into adapter `name`. Raises ValueError when any of them finds no place."""
    own = adapter_state(module, name)
    if other := next((k for k in state if k in own and own[k].shape != state[k].shape), None):
        raise ValueError(
            f"student: its LoRA has {other} of shape {list(state[other].shape)}, here it is {list(own[other].shape)}; set roles.rank to that of the file"
        )
    result = set_peft_model_state_dict(module, dict(state), adapter_name=name)
    placed = adapter_state(module, name)
    if result.unexpected_keys or set(placed) != set(state):
        odd = sorted(set(placed) ^ set(state))[:3]
        raise ValueError(
            f"student: its LoRA does not fit this network (first keys in doubt: {', '.join(odd)}); load it on the base named in its fewstep.json, begin from it with its own roles.targets and roles.exclude"
        )


@contextmanager
def swapped_parameters(parameters: Mapping[str, nn.Parameter], replacement: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other values in these parameters, then put the old ones back."""
    kept = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        assign(parameters, replacement)
        yield
    finally:
        assign(parameters, kept)


def assign(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names, of sharded ones into this process's part.

    Autocast keeps casts of parameters by identity and does not see that their values change; what it kept is dropped.
    """
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(shard_like(tensors[n], p))
    torch.clear_autocast_cache()


def attach_adapter(module: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> Adapter:
    """Attach a LoRA in PEFT's file format to a network, next to those that are there, switched off. Raises ValueError if it does not fit."""
    name = unused_name(module, "student")
    names = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    known = {n.replace(".base_layer", "") for n, _ in module.named_modules()}
    if missing := [n for n in names if n not in known]:
        raise ValueError(
            f"student: the base network has no layer {missing[0]} ({len(missing)} of {len(names)} are missing); load it on the base named in its fewstep.json"
        )
    add_adapter(module, name, rank, alpha, names, seed=0)
    load_adapter(module, name, state)
    adapter = Adapter(tuple(adapter_layers(module)), name)
    adapter.switch(False)
    return adapter


def plain_state(module: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a LoRA with its scale in its weights, in PEFT's file format, and PEFT's settings for its header.

    Whatever alpha it was made with, here it is the rank, so that the LoRA is right also where headers are not read.
    """
    settings = module.peft_config[name].to_dict()  # type: ignore[union-attr,index]
    state = {k: v.detach().cpu().clone() for k, v in adapter_state(module, name).items()}
    return scaled(state, settings["lora_alpha"] / settings["r"]), settings | {"lora_alpha": settings["r"]}
