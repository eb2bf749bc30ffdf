"""Memory of a training, measured before the training.

One iteration of the real training runs on fake (meta) tensors, and every tensor is counted while the tensor
lives.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..backbones.base import Backbone
from ..backbones.kinds import Operations, Unfilled
from ..backbones.parts import blocks_of
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..methods.method import Method
from ..objectives.rewards import REWARDS
from ..roles.roles import Roles
from .ledger import MemoryTracker, module_bytes, storage_bytes
from .loop import TrainConfig, distill
from .once import Calls, Costs
from .optimizer import state_bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Training:
    """Bytes of a training on one card, by purpose.

    `work` is temporary: activations, inputs kept for gradients, estimates, and whole blocks of sharded weights.
    """

    base: int  # of the frozen denoiser; trained copies count as `trained`
    trained: int
    gradients: int
    optimiser: int
    average: int
    work: int
    sampling: int = 0  # temporary, of the largest call without gradient at the batch of the training
    exchange: int = 0  # temporary, where cards exchange gradients
    gathered: int = 0  # temporary, of the largest tensor that all cards put together
    host: int = 0  # of a checkpoint, which the machine's memory holds while it is written

    @property
    def held(self) -> int:
        """Bytes between two iterations."""
        return self.base + self.trained + self.optimiser + self.average

    @property
    def total(self) -> int:
        """Bytes at the peak of an iteration."""
        return self.held + self.gradients + self.work


def training_bytes(
    backbone: Backbone,
    make: Callable[[], Roles],
    method: Method,
    times: Tensor,
    config: TrainConfig,
    data: Embeddings,
    cards: int = 1,
    short: bool = True,
    known: Costs | None = None,
) -> Training:
    """Return the bytes of an iteration after the warm-up.

    They are those on each of `cards`. The base may have fake (meta) tensors. `make` makes the roles on this
    backbone; `times` are the times of the trajectories that the method may need; a few prompts are enough as
    `data`. With `short`, equal calls are made once, see `once`; `known` are the costs of earlier counts. The state
    of an optimizer is counted by a formula, which needs no package. Raises ValueError as the training would.
    """
    states = torch.zeros(data.count, *backbone.shape)
    real = ImageData(states, data, "") if method.needs.images else None
    walks = torch.zeros(data.count, len(times), *backbone.shape)
    paths = Trajectories(walks, times, data, walks[:0], times, "") if method.needs.trajectories else None
    config = config.on(1)
    one = replace(config, iterations=1, decay=0, accumulate=min(config.accumulate, 2), optimizer="adamw")
    # One step needs as much memory as four: the steps without gradient hold less.
    begun = method.one_step()
    roles = make()  # outside of the tracker: unquantized base weights exist only before
    if roles.step_times is not None:  # each step's weights are cast by themselves
        begun = replace(begun, steps=method.steps)
    if method.needs.reward:
        roles = replace(roles, reward=REWARDS["brightness"])  # the networks of others are not counted
    known = Costs() if known is None else known
    with Unfilled(known.operations):
        hollow(roles)
    trained = {role: list(own.values()) for role, own in roles.trained.items()}
    parameters = [p for own in trained.values() for p in own]
    held = [t for n in roles.networks.values() for t in (*n.parameters(), *n.buffers())]
    calls = Calls(
        roles.networks.values(), lambda: roles.active[0][0], roles.served, short and roles.discriminator is None, known
    )
    with MemoryTracker(known.operations) as ledger:
        ledger.add(*held, *parameters, *roles.average.values())
        if one.accumulate > 1 and roles.discriminator is None:
            # A second batch finds the gradients of the first one. Without another pass: they are there at once.
            one = replace(one, accumulate=1)
            for p in parameters:
                p.grad = torch.zeros_like(p)
        with calls.counted(ledger):
            for _ in distill(roles, begun, data, one, real=real, paths=paths):
                pass
    whole, average = storage_bytes(*parameters), storage_bytes(*roles.average.values())
    base = storage_bytes(*held) - storage_bytes(
        *(p for n in roles.networks.values() for p in n.parameters() if p.requires_grad)
    )
    work = ledger.peak - base - 2 * whole - state_bytes(parameters, one.optimizer) - average
    moments = state_bytes(parameters, config.optimizer)
    found = Training(base, whole, whole, moments, average, work, calls.most, host=whole + moments + average)
    if cards == 1:
        return found
    if not config.shard:  # a flat copy of a role's gradients, their sum and their mean
        return replace(found, exchange=3 * max(storage_bytes(*own) for own in trained.values()))
    return sharded_bytes(found, roles, cards)


def hollow(roles: Roles) -> None:
    """Replace real tensors in networks of fake (meta) tensors by fake ones.

    Calls that mix both take much longer.
    """
    network = roles.networks["teacher"]
    mode = next((p.fake_mode for p in network.parameters() if isinstance(p, FakeTensor)), None)
    if mode is None:
        return
    made: dict[int, nn.Parameter] = {}
    for module in {id(m): m for n in roles.networks.values() for m in n.modules()}.values():
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, FakeTensor):
                fake = FakeTensor(mode, p.detach(), "cpu") if p.is_meta else mode.from_tensor(p.detach())
                made[id(p)] = nn.Parameter(fake, p.requires_grad)
                module._parameters[name] = made[id(p)]
    for role, own in roles.trained.items():
        roles.trained[role] = {n: made.get(id(p), p) for n, p in own.items()}
    for name, p in roles.trained["student"].items():
        if isinstance(p, FakeTensor) and not isinstance(roles.average[name], FakeTensor):
            old = roles.average[name]
            roles.average[name] = FakeTensor(mode, old, "cpu") if old.is_meta else mode.from_tensor(old)


def sharded_bytes(whole: Training, roles: Roles, cards: int) -> Training:
    """Return the bytes of a training whose weights cards share.

    A card holds its part of all blocks, and has whole: what is outside of blocks, one block that computes, the
    next one with the buffer that it arrives in, and the gradients of a block with theirs.
    """
    networks = list({id(n): n for n in roles.networks.values()}.values())
    blocks = [block for n in networks for block in blocks_of(n)]
    inside = {id(p): p for block in blocks for p in block.parameters()}
    saved = dict.fromkeys(("base", "trained", "average"), 0)
    for p in inside.values():
        rest = p.numel() // p.shape[0] if p.ndim else 1
        saved["trained" if p.requires_grad else "base"] += (
            p.numel() - rest * -(-(p.shape[0] if p.ndim else 1) // cards)
        ) * p.element_size()
    for name, p in roles.trained["student"].items():
        if id(p) in inside:
            saved["average"] += (p.numel() - p.numel() // p.shape[0] * -(-p.shape[0] // cards)) * roles.average[
                name
            ].element_size()
    share = 1 - saved["trained"] / max(1, whole.trained)
    largest = max(blocks, key=module_bytes)
    moved = 3 * module_bytes(largest) + 2 * storage_bytes(*(p for p in largest.parameters() if p.requires_grad))
    return replace(
        whole,
        base=whole.base - saved["base"],
        trained=whole.trained - saved["trained"],
        gradients=whole.gradients - saved["trained"],
        optimiser=int(whole.optimiser * share),
        average=whole.average - saved["average"],
        work=whole.work + moved,
        sampling=whole.sampling + moved,
        gathered=2 * max(p.numel() * p.element_size() for own in roles.trained.values() for p in own.values()),
    )


def peak_bytes(
    run: Callable[[], object],
    *networks: nn.Module,
    known: Operations | None = None,
    autoencoder: nn.Module | None = None,
) -> int:
    """Return the peak bytes of `run` and these networks.

    An `autoencoder` decodes states of each shape once.
    """
    with MemoryTracker(known) as ledger, ExitStack() as counted:
        ledger.add(*(t for n in networks for t in (*n.parameters(), *n.buffers())))
        if autoencoder is not None:
            counted.enter_context(Calls([autoencoder], lambda: None, {}, called="decode").counted(ledger))
        run()
    return ledger.peak


def calls_once(run: Callable[[], Result], networks: Sequence[nn.Module], known: Operations | None = None) -> Result:
    """Return `run()`, with equal calls of hollow networks made once."""
    with MemoryTracker(known) as ledger, ExitStack() as all_counted:
        for network in networks:
            all_counted.enter_context(Calls([network], lambda: None, {}).counted(ledger))
        return run()


def calls_alone(run: Callable[[], object], networks: Sequence[nn.Module], known: Operations | None = None) -> list[int]:
    """Return the bytes of each network alone while `run` calls it.

    Its weights are included.
    """
    calls = [Calls([network], lambda: None, {}) for network in networks]
    with MemoryTracker(known) as ledger, ExitStack() as all_counted:
        ledger.add(*(t for n in networks for t in (*n.parameters(), *n.buffers())))
        for own in calls:
            all_counted.enter_context(own.counted(ledger))
        run()
    return [module_bytes(n) + own.most for n, own in zip(networks, calls, strict=True)]
