"""What fewstep asks of a network by itself: the type that it calculates in, weights that can be read, one way to compute."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LORA = "lora_"  # in the names of adapters' weights
FEWER_BITS = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
)  # of types that have as many weights, the first


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of most of a network's own real weights, adapters left out."""
    counts = Counter[torch.dtype]()
    for name, p in module.named_parameters():
        if p.is_floating_point() and LORA not in name:
            counts[p.dtype] += p.numel()
    return max(
        counts,
        key=lambda kind: (counts[kind], -FEWER_BITS.index(kind) if kind in FEWER_BITS else -9),
        default=torch.float32,
    )


def time_dtype(module: nn.Module) -> torch.dtype:
    """Return the type in which a network is told times: bfloat16 has no 999, and float16 no 2049."""
    return torch.float64 if dtype_of(module) == torch.float64 else torch.float32


def require_module(module: object) -> None:
    """Check that a network can be read, copied and called. Raises ValueError, naming `module`."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: got a {type(module).__name__}, allowed is a torch.nn.Module with parameters")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            "module: got a scripted network (torch.jit), whose layers cannot carry adapters; pass the module that was scripted"
        )
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"module: {name} has no shape yet (a lazy layer); call the network once, module(x, t), then wrap it"
            )
        if p.is_meta:
            raise ValueError(f"module: {name} is on the meta device, which holds no numbers; load its weights first")
    if not any(p.is_floating_point() for p in module.parameters()):
        raise ValueError(
            f"module: got a {type(module).__name__} without parameters that are real numbers, allowed is a network with some"
        )


def without_fast_path(module: nn.Module) -> nn.Module:
    """Switch off torch's fast path of transformer encoders, and return the same module.

    Without gradient it reads its layers' weights instead of calling them, past their adapters; what it makes of padding is another.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # what only the fast path asks for
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return module


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Within it a module is in eval mode; afterwards its parts are in the modes that they were in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
