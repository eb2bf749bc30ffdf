"""Calls of blocks, of which each kind is made once.

With fake (meta) tensors a call has no numbers, only bytes. A call like an earlier one, of equal layers with inputs of
the same shapes, needs as many bytes again. So it is not made: its outputs are there without it, and its graph keeps
as many bytes. A network of sixty equal blocks takes about as long to count as one of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..backbones.kinds import Kind, Operations, kind_of
from ..backbones.parts import innermost_blocks
from .ledger import MemoryTracker, storage_bytes

Trained = Mapping[Any, Mapping[str, nn.Parameter]]  # role -> name -> parameter
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
OWN = ("forward", "layer_id", "layer_idx")  # attributes in which equal blocks differ


@dataclass(frozen=True)
class Part:
    """A tensor's place in memory.

    It begins at `offset` of a `store` of `items` numbers, which others may share.
    """

    kind: Kind
    store: int
    offset: int
    items: int

    @property
    def fills(self) -> bool:
        """Whether the tensor reaches from its store's begin to its end."""
        reach = sum((n - 1) * step for n, step in zip(self.kind.shape, self.kind.stride, strict=True))
        return not self.offset and 0 not in self.kind.shape and reach + 1 == self.items


def parts_of(outputs: Sequence[Tensor]) -> tuple[Part, ...] | None:
    """Return where outputs lie; None where some share memory under several types."""
    stores = dict[int, int]()
    parts = []
    for t in outputs:
        store = stores.setdefault(address(t), len(stores))
        items = t.untyped_storage().nbytes() // t.element_size()
        parts.append(Part(Kind.of(t), store, int(t.storage_offset()), items))
    one_type = len({(part.store, part.kind.dtype) for part in parts}) == len(stores)
    return tuple(parts) if one_type else None


def placed(parts: Sequence[Part], like: Tensor) -> tuple[Tensor, ...]:
    """Return tensors without numbers, which share memory as measured ones did."""
    if len({part.store for part in parts}) == len(parts) and all(part.fills for part in parts):
        return tuple(part.kind.made(like) for part in parts)
    memory = {part.store: like.new_empty(part.items, dtype=part.kind.dtype) for part in parts}
    return tuple(memory[p.store].as_strided(p.kind.shape, p.kind.stride, p.offset) for p in parts)


@dataclass(frozen=True)
class Cost:
    """The bytes of a block's call.

    `first` and `later` are those at its peak, beyond what is there before: a first call also leaves `casts` of
    trained weights. The graph keeps `kept` bytes of its own, and the in- and outputs that `keeps` marks. `backward`
    are those at the peak of the backward pass, beyond what is there before with the gradients of the outputs.
    """

    outputs: tuple[Part, ...]
    places: tuple[int, ...]  # of the outputs in what the block returns; -1 for None
    spec: TreeSpec
    first: int
    later: int
    casts: int
    kept: int = 0
    keeps: tuple[bool, ...] = ()
    backward: int = 0
    gradients: tuple[Part | None, ...] = ()  # of inputs and trained weights; None where there is none

    def returned(self, outputs: Sequence[Tensor]) -> Any:
        """Return the outputs as the block returns them."""
        return tree_unflatten([None if place < 0 else outputs[place] for place in self.places], self.spec)


class Casts:
    """The casts of trained weights that autocast keeps until they change.

    Torch does not say when it drops them. A cast of an empty weight tells: a call casts it again then.
    """

    def __init__(self, ledger: MemoryTracker, like: Tensor) -> None:
        self.ledger, self.made = ledger, dict[object, Tensor | None]()
        self._device, self._least = like.device.type, -1
        self._x, self._w = (like.new_empty(0, 1, dtype=torch.float32) for _ in range(2))
        self._w.requires_grad_(True)

    def look(self) -> None:
        """Drop what autocast has dropped."""
        if not torch.is_autocast_enabled(self._device):
            self.made.clear()
        elif self._least < 0:
            self._call()
            self._least = self._call()
        elif self._call() > self._least:
            self.made.clear()

    def _call(self) -> int:
        """Return the number of operations of a call."""
        before = self.ledger.operations
        with torch.enable_grad():
            F.linear(self._x, self._w)
        return self.ledger.operations - before


class Costs:
    """What calls of blocks cost.

    By the kinds of blocks and of their inputs.
    """

    def __init__(self) -> None:
        self.costs = dict[object, Cost | None]()
        self.operations = Operations()
        self._kinds = dict[object, int]()

    def number(self, block: nn.Module) -> int | None:
        """Return the number of a block's kind.

        None for a block into which hooks look.
        """
        if any(m._forward_hooks or m._forward_pre_hooks for m in block.modules()):
            return None
        return self._kinds.setdefault(signature(block), len(self._kinds))


def signature(block: nn.Module) -> object:
    """Return what equal blocks have in common.

    Layers, settings, and the shapes and types of weights.
    """
    return tuple(
        (
            name,
            type(m),
            tuple((k, v if isinstance(v, PLAIN) else type(v)) for k, v in vars(m).items() if k not in OWN),
            tuple((n, kind_of(t)) for held in (m._parameters, m._buffers) for n, t in held.items()),
        )
        for name, m in block.named_modules()
    )


class Once(torch.autograd.Function):
    """A block's call that was measured before."""

    @staticmethod
    def forward(ctx: Any, ledger: MemoryTracker, cost: Cost, like: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """Return outputs, and keep what the block keeps."""
        outputs = placed(cost.outputs, like)
        pairs = zip(cost.keeps, (*tensors[: len(cost.keeps) - len(outputs)], *outputs), strict=True)
        kept = like.new_empty(cost.kept, dtype=torch.uint8)
        ctx.save_for_backward(kept, *(t for keep, t in pairs if keep))
        each = zip(cost.outputs, outputs, strict=True)
        ctx.mark_non_differentiable(*(t for part, t in each if not part.kind.graded))
        ctx.ledger, ctx.cost, ctx.like = ledger, cost, like
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        """Return gradients, and drop what was kept."""
        kept, *_rest = ctx.saved_tensors  # a checkpointed block is computed again here
        ctx.ledger.reach(ctx.cost.backward)
        ctx.ledger.forget(kept)
        gradients = iter(placed([part for part in ctx.cost.gradients if part is not None], ctx.like))
        return None, None, None, *(None if part is None else next(gradients) for part in ctx.cost.gradients)


class End(torch.autograd.Function):
    """A number made of a block's outputs.

    Its gradients need no other memory.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        """Return the number."""
        ctx.each, ctx.like = [(t.shape, t.dtype) for t in outputs], outputs[0].new_empty(())
        return ctx.like.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs' gradients."""
        return tuple(ctx.like.new_empty(shape, dtype=dtype) for shape, dtype in ctx.each)


def hollowed(ledger: MemoryTracker, like: Tensor, value: Any) -> Any:
    """Return a tensor with numbers as one without, and all else unchanged.

    Layers before the first weights would calculate with its numbers.
    """
    known = not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.requires_grad
    if known or not isinstance(like, FakeTensor):
        return value
    with ledger.aside():
        fake = like.fake_mode.from_tensor(value)
        ledger.leave_out(fake)  # the one with numbers counts
    return fake


def measured(
    ledger: MemoryTracker,
    like: Tensor,
    forward: Callable[..., Any],
    leaves: Sequence[object],
    spec: TreeSpec,
    own: Sequence[nn.Parameter],
    graded: bool,
    casting: bool,
) -> Cost | None:
    """Return the cost of a block's call, which is made and differentiated.

    With `casting` it is made twice: a first call may leave casts of trained weights. None where the outputs are no new
    tensors.
    """
    inputs = [
        hollowed(ledger, like, v.detach()).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in leaves
    ]
    given = [v for v in inputs if isinstance(v, Tensor)]
    known, seen = {address(t) for t in given}, set[int]()
    args, kwargs = tree_unflatten(inputs, spec)

    def pack(t: Tensor) -> Tensor:
        seen.add(address(t))
        return t.detach()

    # The hooks also keep these calls from the checkpointing around them.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first, left = 0, 0
        if casting:
            _, first, left = ledger.above(lambda: tree_map(kind_of, forward(*args, **kwargs)))
            seen.clear()
        found, later, remains = ledger.above(lambda: forward(*args, **kwargs))
        first = first or later
    told, out_spec = tree_flatten(found)
    made = list({id(t): t for t in told if isinstance(t, Tensor)}.values())
    parts = parts_of(made)
    ends = [t for t in made if t.requires_grad]
    shared = any(address(t) in known for t in made)
    if parts is None or shared or not all(isinstance(t, Tensor | None) for t in told) or (graded and not ends):
        return None
    places = tuple(-1 if t is None else next(i for i, own in enumerate(made) if own is t) for t in told)
    if not graded:
        return Cost(parts, places, out_spec, first, later, left)
    keeps = tuple(address(t) in seen for t in (*given, *made))
    kept, incoming = remains - storage_bytes(*made), sum(t.nbytes for t in ends)
    end = End.apply(*ends)
    del found, told, made, ends
    wanted = [t for t in given if t.requires_grad] + list(own)
    seed = torch.ones_like(end)
    gradients, backward, _ = ledger.above(lambda: torch.autograd.grad(end, wanted, seed, allow_unused=True))
    if (left_parts := parts_of([g for g in gradients if g is not None])) is None:
        return None
    rest, of = iter(gradients), iter(left_parts)
    each = tuple(next(of) if t.requires_grad and next(rest) is not None else None for t in (*given, *own))
    return Cost(parts, places, out_spec, first, later, left, kept, keeps, backward - incoming, each)


def address(t: Tensor) -> int:
    """Return the identity of a tensor's memory."""
    return t.untyped_storage()._cdata


class Calls:
    """The calls of some networks.

    `role()` names whose trained weights the networks use. With `short`, calls of hollow networks are made once of each
    kind; the networks' layers then must not be looked at from outside. `most` is the largest need of a call without
    gradient, in bytes. `known` are the costs of an earlier count, which this one adds to. `called` is the method that
    counts: `decode` of autoencoders, whose blocks are not looked into.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        role: Callable[[], object],
        trained: Trained,
        short: bool = True,
        known: "Costs | None" = None,
        called: str = "forward",
    ) -> None:
        self.networks = list({id(n): n for n in networks}.values())
        self.role, self.short, self.most, self.called = role, short, 0, called
        self.known = Costs() if known is None else known
        self._whole = dict[object, tuple[Any, int]]()
        self._of = {id(p): r for r, own in trained.items() for p in own.values()}
        self._own = dict[tuple[int, object], list[nn.Parameter]]()
        self._number = dict[int, int | None]()

    @contextmanager
    def counted(self, ledger: MemoryTracker) -> Iterator[None]:
        """Count the calls inside the block."""
        put = list[tuple[nn.Module, str]]()
        for network in self.networks:
            like = next(network.parameters())
            short = self.short and isinstance(like, FakeTensor)
            casts = Casts(ledger, like) if short else None
            if casts is not None and self.called == "forward":
                for block in innermost_blocks(network):
                    block.forward = partial(self._block, ledger, casts, block, block.forward)
                    put.append((block, "forward"))
            setattr(network, self.called, partial(self._network, ledger, casts, network, getattr(network, self.called)))
            put.append((network, self.called))
        try:
            yield
        finally:
            for module, name in put:
                delattr(module, name)

    def _network(
        self,
        ledger: MemoryTracker,
        casts: Casts | None,
        network: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if casts is not None:
            casts.look()
            args, kwargs = tree_map(partial(hollowed, ledger, next(network.parameters())), (args, kwargs))
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        key = (id(network), self.role(), *map(kind_of, tree_leaves((args, kwargs))))
        if casts is not None and key in self._whole:
            output, needed = self._whole[key]
            ledger.reach(needed)
            return tree_map(lambda kind: kind.made(next(network.parameters())), output)
        found, needed, left = ledger.above(lambda: forward(*args, **kwargs))
        self.most = max(self.most, needed)
        outputs = tree_leaves(found)
        if casts is not None and all(isinstance(t, Tensor) for t in outputs) and left <= storage_bytes(*outputs):
            self._whole[key] = tree_map(kind_of, found), needed
        return found

    def _block(
        self,
        ledger: MemoryTracker,
        casts: Casts,
        block: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors, role = [t for t in leaves if isinstance(t, Tensor)], self.role()
        if not all(isinstance(v, (Tensor, *PLAIN)) for v in leaves):
            return forward(*args, **kwargs)
        own = self._trained(block, role) if torch.is_grad_enabled() else []
        graded = bool(own) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        number, like = self._number_of(block), next(block.parameters())
        if number is None:
            return forward(*args, **kwargs)
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled(like.device.type) else None
        kinds = (*map(kind_of, leaves), str(spec))
        key = (number, len(self._trained(block, role)), graded, mixed, kinds)
        name = (id(block), role, graded)
        if key not in self.known.costs:
            with ledger.aside():
                self.known.costs[key] = measured(
                    ledger, like, forward, leaves, spec, own, graded,
                    mixed is not None and bool(self._trained(block, role)),
                )  # fmt: skip
            casts.made.setdefault(name, None)
        cost = self.known.costs[key]
        if cost is None:
            return forward(*args, **kwargs)
        first = name not in casts.made
        ledger.reach(cost.first if first else cost.later)
        if first:
            casts.made[name] = like.new_empty(cost.casts, dtype=torch.uint8) if cost.casts else None
        if graded:
            return cost.returned(Once.apply(ledger, cost, like, *tensors, *own))
        return cost.returned(placed(cost.outputs, like))

    def _trained(self, block: nn.Module, role: object) -> list[nn.Parameter]:
        """Return the weights of a block that a role trains."""
        if (key := (id(block), role)) not in self._own:
            self._own[key] = [p for p in block.parameters() if self._of.get(id(p)) == role]
        return self._own[key]

    def _number_of(self, block: nn.Module) -> int | None:
        """Return the number of a block's kind, see `Costs.number`."""
        if id(block) not in self._number:
            self._number[id(block)] = self.known.number(block)
        return self._number[id(block)]
