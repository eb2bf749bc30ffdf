"""Copies of a model around the same weights.

A run or a student changes the modules of a copy. No other copy sees the change.
"""

import copy
from typing import Any, TypeVar

from torch import nn

from .base import Backbone
from .few_step import with_network
from .modules import without_fast_path
from .parts import DiffusersBackbone

Model = TypeVar("Model", bound=Backbone)


def apart(backbone: Model) -> Model:
    """Return the same model with separate modules around the same tensors.

    Adapters, hooks and quantization in one copy do not show in the other. Only the modules take memory.
    Weights that are trained in place change in both copies.

    Raises ValueError for a network that Python cannot copy, and for a model whose network cannot be
    replaced.
    """
    network = around_same_weights(backbone.module, backbone.name, isinstance(backbone, DiffusersBackbone))
    again = copy.copy(backbone)
    if isinstance(backbone, DiffusersBackbone):
        pipe = backbone.pipe
        object.__setattr__(again, "pipe", with_network(pipe, network, pipe.scheduler, type(pipe)))
        return again
    try:
        object.__setattr__(again, "module", network)
    except AttributeError as error:
        raise ValueError(
            f"teacher: the network of a {type(backbone).__name__} cannot be replaced ({error}); "
            "make `module` a field of it, as in fewstep.Denoiser"
        ) from error
    return again


def rested(backbone: Model) -> Model:
    """Return a model whose calls do not change the backbone's network.

    A copy for a custom network, and for a network in training mode; otherwise the same model.
    """
    still = isinstance(backbone, DiffusersBackbone) and not any(m.training for m in backbone.module.modules())
    return backbone if still else apart(backbone)


def around_same_weights(network: nn.Module, name: str, share_buffers: bool = False) -> nn.Module:
    """Return a frozen copy of a network around the same weights.

    Tied tensors stay tied. The copy is in eval mode. Buffers are copied unless they are to be shared: a
    custom network may write into its buffers when it is called. Raises ValueError where Python cannot copy
    the network.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    memo |= {id(b): b if share_buffers else b.detach().clone() for b in network.buffers()}
    try:
        return without_fast_path(copy.deepcopy(network, memo).eval())
    except Exception as error:  # a custom module may raise anything
        raise ValueError(
            f"teacher: the network of {name} cannot be copied "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "keep in it what copy.deepcopy takes: parameters, buffers, modules and plain values"
        ) from error
