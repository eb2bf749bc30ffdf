"""Switching a pipeline's network from step to step.

The pipeline of another library calls the network; by the time that it tells the network, the weights of the step are
made to serve first.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backbone

TOLD = ("timestep", "t")  # what networks call the time


class _ToldError(Exception):
    """Carries the time that a network is told.

    In the units of its argument.
    """

    def __init__(self, time: float) -> None:
        super().__init__()
        self.time = time


def times_told(backbone: Backbone, network: nn.Module, times: Tensor) -> list[float]:
    """Return what a network is told at each of the times [N].

    The network is called for each time, and left before it computes anything.
    """

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        raise _ToldError(_time_in(module, args, kwargs))

    cond, device, found = backbone.encode([""]), next(network.parameters()).device, list[float]()
    handle = network.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        for t in times:
            try:
                backbone.predict(network, torch.zeros(1, *backbone.shape, device=device), t.reshape(1).to(device), cond)
            except _ToldError as told:
                found.append(told.time)
    finally:
        handle.remove()
    return found


def switch_by_time(network: nn.Module, told: Sequence[float], serve: Callable[[int], None]) -> None:
    """Have `serve(k)` called before each call at the k-th time.

    `told` are the times that the network is told, of which the nearest counts.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        now = _time_in(module, args, kwargs)
        serve(min(range(len(told)), key=lambda k: abs(told[k] - now)))

    network.register_forward_pre_hook(before, with_kwargs=True)


def _time_in(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the time of a call.

    It is the same for all samples.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    time = next(given[name] for name in TOLD if name in given)
    return float(time.reshape(-1)[0] if isinstance(time, Tensor) else time)
