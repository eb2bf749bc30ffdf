"""Encoders that are loaded when called, and take turns on a device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import CLIPPreTrainedModel, PreTrainedModel, T5PreTrainedModel, UMT5PreTrainedModel

from ..reading import reading
from .base import Backbone
from .parts import DiffusersBackbone, default_dtype, load_part, networks

HEADROOM = 1.25  # memory that an encoder at work takes, relative to its weights
MANY, FEW = 64, 8  # prompts that are encoded at once
SLIGHT = CLIPPreTrainedModel, T5PreTrainedModel, UMT5PreTrainedModel  # no language models
PREFIX = "text_encoder"  # of the names of a pipeline's encoders


def is_deferred(network: nn.Module) -> bool:
    """Return whether a network's weights are not loaded yet."""
    return any(p.is_meta for p in network.parameters())


def deferred(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Return an encoder whose weights are loaded at its first call.

    Until then it is a `kind` that says it is on the CPU, where its inputs have to be.
    """
    config = kind.config_class.from_pretrained(str(folder), subfolder=name, dtype=dtype)
    with torch.device("meta"), default_dtype(dtype):
        network: nn.Module = kind(config)

    def fill(*_: object) -> None:
        handle.remove()
        with reading(f"teacher: {folder / name}", "save the pipeline again"):
            loaded = load_part(kind, folder, name, dtype)
        network._parameters, network._buffers = loaded._parameters, loaded._buffers
        network._modules = loaded._modules
        network.__class__ = kind
        network.requires_grad_(False).eval()

    handle = network.register_forward_pre_hook(fill)
    about = {"device": torch.device("cpu"), "__module__": kind.__module__}
    network.__class__ = type(kind.__name__, (kind,), about)
    return network


def at_once(encoders: Sequence[nn.Module]) -> int:
    """Return the number of prompts that are encoded at once.

    Language models give the states of all layers, and a number for every word that may follow: 64 prompts of
    FLUX.2-klein's take 10 GB for these words alone.
    """
    language = any(isinstance(e, PreTrainedModel) and not isinstance(e, SLIGHT) for e in encoders)
    return FEW if language else MANY


def load_deferred(backbone: Backbone) -> None:
    """Load the encoders that are not loaded yet."""
    if any(is_deferred(e) for e in backbone.encoders):
        backbone.encode([""])


def put(modules: Sequence[nn.Module], device: str | torch.device) -> None:
    """Move networks to a device, except for those not loaded."""
    for module in modules:
        if not is_deferred(module):
            module.to(device)


def place_encoders(backbone: Backbone, device: str | torch.device) -> None:
    """Move the encoders to a device.

    A training that has all embeddings moves the encoders to the CPU to make room. Encoders still work on the
    CPU, slowly.
    """
    put(backbone.encoders, device)


def others(backbone: Backbone) -> list[nn.Module]:
    """Return the networks that are no encoders."""
    known = networks(backbone.pipe) if isinstance(backbone, DiffusersBackbone) else [backbone.module]
    return [n for n in known if not any(n is e for e in backbone.encoders)]


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that a network may take."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's weights."""
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


@contextmanager
def encoding_on(backbone: Backbone, device: torch.device) -> Iterator[None]:
    """Encode on a device inside the block.

    An encoder moves to the device when it is called, and its output to the CPU. Where it does not fit, the
    other encoders leave first, then the other networks until the block ends; an encoder that does not fit alone
    works on the CPU. After the block all encoders are on the CPU.
    """
    place_encoders(backbone, "cpu")
    if device.type != "cuda":
        yield
        return
    here, gone = list[nn.Module](), list[nn.Module]()

    def enter(encoder: nn.Module, args: Any, kwargs: Any) -> Any:
        needed = int(HEADROOM * weight_bytes(encoder))
        if encoder not in here:
            while free_bytes(device) < needed and here:
                put([here.pop(0)], "cpu")
            left = [n for n in others(backbone) if n not in gone]
            while free_bytes(device) < needed and left:
                gone.append(left.pop())
                put(gone[-1:], "cpu")
            if free_bytes(device) >= needed:
                put([encoder], device)
                here.append(encoder)
        return _to((args, kwargs), device if encoder in here else torch.device("cpu"))

    hooks = [
        hook
        for encoder in backbone.encoders
        for hook in (
            encoder.register_forward_pre_hook(enter, with_kwargs=True),
            encoder.register_forward_hook(lambda _, args, output: _to(output, torch.device("cpu"))),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        place_encoders(backbone, "cpu")
        put(gone, device)


def _to(values: Any, device: torch.device) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
