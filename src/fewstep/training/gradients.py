"""Gradients of one iteration's updates: means over batches and over all processes.

In several processes the gradients are views of a few flat tensors, the buckets. A backward pass adds into them in
place. While the last one of an update still computes, each bucket that is complete is already being summed over the
processes. Nothing is copied, and batches before the last are not communicated.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import Work

from ..methods.method import Loss
from ..processes import distributed_errors, sum_of_all
from ..roles.roles import Role, Roles
from ..roles.sharding import by_kind

BUCKET = 25 * 2**20  # bytes, as in torch's DistributedDataParallel


class Reached(Protocol):
    """Whoever notes which tensors a loss has reached."""

    def add(self, role: Role, names: Iterable[str]) -> None:
        """Add the names of tensors that have a gradient."""


class Buckets:
    """The gradients of one update of some parameters, in flat tensors.

    Backward passes reach the last parameters first, so the first bucket holds the last parameters. Every process
    sums the buckets in this order.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], size: int = BUCKET) -> None:
        self.flats: list[Tensor] = []
        self.reached: set[str] = set()
        self.final = False  # whether the next backward pass is the last one
        self._sums: list[Work] = []
        self._missing: list[set[str]] = []
        self._place: dict[str, int] = {}
        for names in _split(dict(reversed([*parameters.items()])), size):
            some = parameters[names[0]]
            flat = torch.zeros(sum(parameters[n].numel() for n in names), dtype=some.dtype, device=some.device)
            for name, part in zip(names, flat.split([parameters[n].numel() for n in names]), strict=True):
                parameters[name].grad = _in_order_of(parameters[name], part)
                self._place[name] = len(self.flats)
            self.flats.append(flat)
            self._missing.append(set(names))
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._came, n)) for n, p in parameters.items()]

    def _came(self, name: str, _: Tensor) -> None:
        """Note that a backward pass has added to a gradient."""
        self.reached.add(name)
        if self.final:
            self._missing[self._place[name]].discard(name)
            self._begin_sums()

    def _begin_sums(self, rest: bool = False) -> None:
        """Begin to sum the next buckets, as far as they are complete."""
        while (k := len(self._sums)) < len(self.flats) and (rest or not self._missing[k]):
            self._sums.append(sum_of_all(self.flats[k]))

    def divide(self, count: int) -> None:
        """Wait for the sums over all processes, and divide them by `count`.

        All processes have to call. Raises ConnectionError with one line if a process has ended.
        """
        for hook in self._hooks:
            hook.remove()
        with distributed_errors():
            self._begin_sums(rest=True)
            for flat, under_way in zip(self.flats, self._sums, strict=True):
                under_way.wait()
                flat.div_(count)


def _split(parameters: Mapping[str, nn.Parameter], size: int) -> list[list[str]]:
    """Split parameters into lists of at most `size` bytes.

    Those of a list have one type and device.
    """
    lists, room, kind = list[list[str]](), 0, None
    for name, p in parameters.items():
        own = p.numel() * p.element_size()
        if not lists or own > room or kind != (p.dtype, p.device):
            lists.append([])
            room, kind = max(size, own), (p.dtype, p.device)
        lists[-1].append(name)
        room -= own
    return lists


def _in_order_of(p: Tensor, flat: Tensor) -> Tensor:
    """Return a view of `flat` with the shape of `p`.

    It has the order of `p` in memory, if `p` is dense.
    """
    ordered = torch.empty_like(p, device="meta").stride()  # that of `p` if it is dense
    return flat.as_strided(p.shape, ordered, flat.storage_offset())


class Gradients:
    """The gradients of the updates of one iteration.

    They are in `grad` of the trained parameters.
    `batches` is the number of batches of this process. `groups` of the processes have batches of their own; those of
    one group share tokens and have a part of each gradient. With `separate` no loss reaches another role's weights.
    """

    def __init__(self, roles: Roles, batches: int, processes: int, groups: int, separate: bool, reach: Reached) -> None:
        self.roles, self.batches, self.processes, self.separate = roles, batches, processes, separate
        self.share = processes // groups / batches  # of a batch in a mean over the processes
        self.reach = reach
        self.buckets: dict[Role, Buckets] = {}

    def add(self, loss: Loss, last: bool) -> None:
        """Add the gradients of one batch to those of the role.

        `last` says that it is the update's last batch. Parameters that no batch reaches get a zero gradient. Raises
        ValueError if the loss reaches no parameter.
        """
        own = self.roles.trained[loss.role]
        if not loss.value.requires_grad:
            raise ValueError(
                f"train: the {loss.role}'s loss reaches none of its {len(own)} trained tensors; "
                "check that the network computes with gradients, or set train.precision=no"
            )
        if self.processes > 1 and loss.role not in self.buckets:
            self.buckets[loss.role] = Buckets(_whole(own))
        with distributed_errors():
            if self.roles.sharded:
                self._add_of_parts(loss, last)
            elif self.processes > 1:
                self._add_in_place(loss, last)
            else:
                self._add_alone(loss)

    def _add_alone(self, loss: Loss) -> None:
        """Add gradients in the only process."""
        own, share = self.roles.trained[loss.role], 1 / self.batches
        grads = torch.autograd.grad(loss.value, list(own.values()), allow_unused=True)
        self.reach.add(loss.role, (n for n, g in zip(own, grads, strict=True) if g is not None))
        for p, g in zip(own.values(), grads, strict=True):
            added = torch.zeros_like(p) if g is None else g if share == 1 else g * share
            p.grad = added if p.grad is None else p.grad.add_(added)

    def _add_in_place(self, loss: Loss, last: bool) -> None:
        """Add gradients into buckets.

        In the last batch the sums over processes begin.
        """
        buckets = self.buckets[loss.role]
        if buckets.final:
            raise ValueError(
                f"train: the method has two losses of the {loss.role} together, of which several processes would sum "
                "the first alone; yield their sum"
            )
        buckets.final = last
        torch.autograd.backward(loss.value, inputs=list(self.roles.trained[loss.role].values()))
        self.reach.add(loss.role, buckets.reached)

    def _add_of_parts(self, loss: Loss, last: bool) -> None:
        """Add gradients of sharded weights.

        They come from a backward pass only, which may also reach other roles; the gradients of other roles are
        restored. Where it cannot, batches before the last are not communicated, see `Roles.sum_gradients`.
        """
        own = self.roles.trained[loss.role]
        others = [p for role, theirs in self.roles.trained.items() if role != loss.role for p in theirs.values()]
        kept = [(p, p.grad) for p in (by_kind(others)[1] if self.separate else others)]
        for p, _ in kept:
            p.grad = None
        self.roles.sum_gradients(last or not self.separate)
        (loss.value if self.share == 1 else loss.value * self.share).backward()
        for p, grad in kept:
            p.grad = grad
        if last:
            buckets = self.buckets.get(loss.role)
            apart = set() if buckets is None else {*_whole(own)} - buckets.reached
            self.reach.add(loss.role, (n for n, p in own.items() if p.grad is not None and n not in apart))
            for p in own.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def finish(self, role: Role) -> None:
        """Complete the mean of a role's gradients over all processes.

        Raises ConnectionError with one line if a process has ended.
        """
        if (buckets := self.buckets.pop(role, None)) is not None:
            buckets.divide(self.processes if self.roles.sharded else self.processes * self.batches)
        # torch's fused AdamW silently reads a gradient in the memory order of the parameter.
        for p in _whole(self.roles.trained[role]).values():
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def _whole(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters that every process has whole."""
    whole = {id(p) for p in by_kind(list(parameters.values()))[1]}
    return {n: p for n, p in parameters.items() if id(p) in whole}
