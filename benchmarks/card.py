"""A card made of the CPU's memory, which counts what would stall a real one.

Tensors on the card compute on the CPU and say that they are on another device. As on a GPU, a number reaches the host
by a read, a tensor of the host reaches the card by a copy, and an operation on tensors of both is refused. Torch offers
no second device on a CPU, so this one takes the name `meta`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CARD = torch.device("meta")
aten = torch.ops.aten
# Operations whose result's size, or result, the host has to know.
READING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
HERE = ("/src/fewstep/", "/diffusers/", "/peft/")


class OnCard(Tensor):
    """A tensor on the card. `held` are the values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCard":
        made: OnCard = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CARD,
        )
        made.held = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return computed(func, args, dict(kwargs or {}))


class CardGenerator(torch.Generator):
    """A generator on the card, with the numbers of one on the CPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD


def computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the inner tensors, and return results on the device where they belong."""
    to_card = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnCard)]
    goal = kwargs.get("device")
    lands = CARD if goal is None and to_card else torch.device("cpu") if goal is None else torch.device(goal)
    if func is aten.copy_.default:
        lands = args[0].device
    if goal is not None and torch.device(goal) == CARD:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": False}
    inner_args, inner_kwargs = tree_map_only(OnCard, lambda t: t.held, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if lands == CARD:
        known = {id(t.held): t for t in to_card}  # in-place operations return their argument
        if func is aten._to_copy.default and not to_card and out is args[0]:
            out = out.clone()
        return tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else OnCard(t), out)
    if to_card and isinstance(out, Tensor) and any(out is t.held for t in to_card):
        return out.clone()
    return out


class Stalls(TorchDispatchMode):
    """Counter of what the host asks of the card, by the place in the source.

    `reads` wait until the card has computed a number. `copies` of the host's memory wait until they have arrived.
    `sent` copies come from pinned memory and nobody waits. `kernels` are operations on the card that compute something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.copies, self.sent, self.kernels = Counter[str](), Counter[str](), Counter[str](), 0
        self._pinned = set[int]()
        self._kept: list[Tensor] = []  # so that no other tensor takes a pinned tensor's identity

    @property
    def stalls(self) -> int:
        return self.reads.total() + self.copies.total()

    def clear(self) -> None:
        for counter in (self.reads, self.copies, self.sent):
            counter.clear()
        self.kernels = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is aten._pin_memory.default:
            out = args[0].clone()
            self._pinned.add(id(out))
            self._kept.append(out)
            return out
        if func is aten.is_pinned.default:
            return id(args[0]) in self._pinned
        self._count(func, args, options)
        return computed(func, args, options)

    def _count(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
        on_card = [t for t in tensors if isinstance(t, OnCard)]
        made_there = "device" in options and options["device"] is not None and torch.device(options["device"]) == CARD
        if not on_card and not made_there:
            return
        if func in READING:
            self.reads[f"{_name(func)} {_place()}"] += 1
            return
        if func is aten._to_copy.default and options.get("device") is not None:
            if made_there and not on_card:
                self._copied(args[0], bool(options.get("non_blocking")))
                return
            if not made_there:
                self.reads[f"to the host {_place()}"] += 1
                return
        if func is aten.copy_.default:
            there, here = isinstance(args[0], OnCard), isinstance(args[1], OnCard)
            if there and not here:
                self._copied(args[1], len(args) > 2 and bool(args[2]))
                return
            if here and not there:
                self.reads[f"to the host {_place()}"] += 1
                return
        if func in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.reads[f"mask {_place()}"] += 1
                elif isinstance(index, Tensor) and not isinstance(index, OnCard):
                    self._copied(index, False)
        elif any(t.ndim or func is aten.where.self for t in tensors if not isinstance(t, OnCard)) and not made_there:
            raise RuntimeError(f"{_name(func)} of tensors on two devices, {_place()}")
        if not _is_view(func):
            self.kernels += 1

    def _copied(self, source: Tensor, non_blocking: bool) -> None:
        where = self.sent if non_blocking and id(source) in self._pinned else self.copies
        where[f"{tuple(source.shape)} {_place()}"] += 1


def _name(func: Callable[..., Any]) -> str:
    return str(func)


def _is_view(func: Any) -> bool:
    return func is aten.detach.default or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _place() -> str:
    """File and line of the innermost frame of the project, or of a network's package."""
    frame = sys._getframe()
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in HERE):
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def counted() -> Iterator[Stalls]:
    """Count within the block, in which networks may be moved to `CARD` and trained there.

    Torch refuses generators and autocast on the device whose name the card takes; within the block
    they are there.
    """
    from fewstep.training import loop
    from fewstep.training.state import seeded

    tensor = torch.tensor

    def on_card(seed: int, step: int, stream: str, rank: int = 0, device: Any = "cpu") -> torch.Generator:
        made = seeded(seed, step, stream, rank)
        return made if torch.device(device) != CARD else CardGenerator().manual_seed(made.initial_seed())

    def listed(data: Any, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)  # torch copies the host's numbers without a dispatch
        return made if device is None or torch.device(device) != CARD else made.to(CARD)

    with (
        mock.patch.object(loop, "seeded", on_card),
        mock.patch.object(torch, "tensor", listed),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),
        sdpa_kernel(SDPBackend.MATH),
        Stalls() as stalls,
    ):
        yield stalls


def move(roles: Any) -> None:
    """Move all networks of a run, what it trains and its average to the card."""
    modules = [*roles.networks.values(), roles.head, roles.head_to_absorb]
    if roles.discriminator is not None:
        modules.append(roles.discriminator.heads)
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            if isinstance(tensor, torch.nn.Parameter):
                moved[id(tensor)] = torch.nn.Parameter(OnCard(tensor.data), tensor.requires_grad)
            else:
                moved[id(tensor)] = OnCard(tensor)
            kept.append(tensor)
        return moved[id(tensor)]

    kept: list[Tensor] = []
    done = set[int]()
    for module in (part for whole in modules if whole is not None for part in whole.modules()):
        if id(module) in done:
            continue
        done.add(id(module))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, OnCard):
                    held[name] = there(tensor)
    for role, own in roles.trained.items():
        roles.trained[role] = {n: there(p) for n, p in own.items()}
    for name, tensor in roles.average.items():
        roles.average[name] = OnCard(tensor)
