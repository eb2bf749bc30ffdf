"""What fewstep requires of a network.

The network computes in one type and in one way, and its weights can be read.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

LORA = "lora_"  # in the names of adapters' weights
# Of types that have as many weights, the first.
FEWER_BITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of most of a network's weights.

    Adapters do not count.
    """
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
    """Return the type of a network's times.

    bfloat16 has no 999, and float16 no 2049.
    """
    return torch.float64 if dtype_of(module) == torch.float64 else torch.float32


def require_module(module: object) -> None:
    """Check that a network can be read, copied and called.

    Raises ValueError that names `module`.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: got a {type(module).__name__}, allowed is a torch.nn.Module with parameters")
    if scripted := next((n or "it" for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), ""):
        raise ValueError(
            f"module: {scripted} is scripted (torch.jit), which cannot be copied around the same weights; "
            "pass the module that was scripted"
        )
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"module: {name} has no shape yet (a lazy layer); call the network once, module(x, t), then wrap it"
            )
        if p.is_meta:
            raise ValueError(f"module: {name} is on the meta device, which holds no numbers; load its weights first")
    for name, part in module.named_modules():
        hooks = [h for h in part._forward_pre_hooks.values() if isinstance(h, WeightNorm | SpectralNorm)]
        if hooks or any(isinstance(v, Tensor) and v.grad_fn is not None for v in vars(part).values()):
            old = "weight_norm" if hooks and isinstance(hooks[0], WeightNorm) else "spectral_norm" if hooks else ""
            raise ValueError(
                f"module: {name or 'it'} has a weight that torch.nn.utils.{old} computes from others; "
                f"take it out (remove_{old}), or use torch.nn.utils.parametrizations.{old}"
                if old
                else f"module: {name or 'it'} keeps a tensor with a gradient, which cannot be copied; detach it"
            )
    if not any(p.is_floating_point() for p in module.parameters()):
        raise ValueError(
            f"module: got a {type(module).__name__} without parameters that are real numbers, "
            "allowed is a network with some"
        )


def without_fast_path(module: nn.Module) -> nn.Module:
    """Switch off torch's fast path of transformer encoders.

    Without gradient the fast path reads the weights of layers instead of calling the layers, past adapters, and
    treats padding otherwise. Returns the same module.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # what only the fast path asks for
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return module


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while.

    Afterwards every part is in the mode of before.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def seen_dtypes(module: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collect the real dtypes of a network's activations within the block.

    Some networks calculate in another dtype than their weights'.
    """
    seen = set[torch.dtype]()

    def look(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    handles = [part.register_forward_hook(look) for part in module.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def coarsest(*kinds: torch.dtype) -> torch.dtype:
    """Return the type that rounds most."""
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)
