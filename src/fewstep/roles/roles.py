"""Teacher, student and fake score of a run.

The roles are adapters of one frozen network, or three networks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..backbones.base import Backbone, Cond, denoiser, guided, tell
from ..backbones.context import share_tokens
from ..backbones.parts import set_checkpointing
from ..config_fields import OneOf, Range, check_fields
from ..core.guidance import Guidance
from ..core.prediction import Split
from ..core.solvers import Denoise
from ..words import speaks_python
from . import adapters, sharding, step_condition
from .checkpointing import checkpoint_blocks
from .discriminator import Discriminator, features, make_discriminator
from .per_step import by_step, step_name
from .quantized import Kind, quantize, weight_count
from .step_condition import StepCondition

Role = Literal["teacher", "student", "fake", "reward", "discriminator"]
TRAINED: tuple[Role, ...] = ("student", "fake")
SURROGATE: Role = "reward"
HEAD = "head."  # prefix of the head's parameter names
LARGEST_RANK = 4096
LARGE = 0.5  # share of a network's weights
CONDITION = "step_condition"  # name of the condition table among the trained parameters


@speaks_python("roles")
@dataclass(frozen=True, kw_only=True)
class RolesConfig:
    """How student and fake score are kept next to the teacher.

    Raises ValueError for invalid settings.
    """

    lora: bool = True
    """Train LoRA adapters on one copy of the weights; otherwise full copies, all weights trained."""

    per_step: bool = False
    """Train weights of its own for each of the student's steps, K LoRAs or K copies (Z-Image Turbo++, arXiv 2606.12575;
    one expert for each phase in Phased DMD, arXiv 2510.27684): the memory of K students, the time of one."""

    rank: Annotated[int, Range(0, LARGEST_RANK, hint=" (0: no LoRA); 32 is a good start")] = 32
    """Rank of the LoRA; 0 trains a head alone."""

    alpha: Annotated[float, Range(0, above=True, hint="; leave it out for the rank itself")] | None = None
    """LoRA alpha; by default the rank, so that a LoRA is right at strength 1.0."""

    targets: Annotated[str, OneOf(adapters.TARGETS)] = "all"
    """Layers that carry LoRA: all, linear, conv or attention."""

    exclude: tuple[str, ...] = (
        "add_embedding",
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    )
    """Layers without LoRA, by a part of their name; by default those that programs which read kohya's names leave
    out."""

    checkpointing: bool = False
    """Keep only the inputs of the networks' blocks and compute the rest again: a third more time, a fraction of the
    memory."""

    quantize: Kind | None = None
    """Quantize the frozen weights that adapters share, the teacher's too: int8 or nf4."""

    def __post_init__(self) -> None:
        check_fields(self, "roles")
        if self.per_step and self.lora and not self.rank:
            raise ValueError(
                "roles.per_step: got true with roles.rank=0, which trains a head alone; set it to false, or choose a "
                "rank from 1, e.g. 32"
            )
        if self.quantize is not None and not self.lora:
            raise ValueError(
                f"roles.quantize: got {self.quantize}, which is for weights that stay as they are; "
                "set roles.lora=true, or roles.quantize=null"
            )

    @property
    def scale(self) -> float:
        """Factor of a LoRA's effect, alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def large_rank(network: nn.Module, config: RolesConfig) -> str:
    """Return a message about a LoRA that is large for the network.

    The text is empty for a LoRA that is small enough.
    """
    if not (config.lora and config.rank):
        return ""
    names = adapters.targets(network, config.targets, config.exclude)
    share = adapters.lora_weights(network, names, config.rank) / weight_count(network)
    fits = adapters.fitting_rank(network, names)
    if share <= LARGE or fits >= config.rank:
        return ""
    return (
        f"LORA roles.rank: {config.rank} trains {share:.0%} as many weights as this small network has, which is "
        f"slower and no better; set roles.rank={fits}, or train all weights (roles.lora=false)"
    )


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The networks of one run.

    `make_roles` makes the roles.
    """

    backbone: Backbone
    networks: Mapping[str, nn.Module]  # by role, and by `step_name` where each step has weights of its own
    # student, fake and, where there is one, a reward's surrogate and a discriminator -> name -> parameter
    trained: dict[Role, Mapping[str, nn.Parameter]]
    layers: tuple[LoraLayer, ...]  # empty for full copies
    config: RolesConfig
    average: dict[str, Tensor] = field(default_factory=dict)  # EMA of the student, by parameter name
    # Step counts or guidance scales that student and fake score are conditioned on; usually none.
    condition_values: tuple[float, ...] = ()
    conditions: Mapping[str, StepCondition] = field(default_factory=dict)
    discriminator: Discriminator | None = None
    # The score of images [B, 3, H, W] in [0, 1] and prompts that the student is to raise: [B].
    reward: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    head: nn.Module | None = None  # a `core.solvers.Correction` that is trained as part of the student
    head_to_absorb: nn.Module | None = None  # a head that the student starts with and learns to do without
    # Guidance scale that networks with embedded guidance are given; None: the one in their conditions.
    embedded_guidance: float | None = None
    # The copies are meta tensors until they are sharded, when they become copies of the teacher's parts.
    on_meta: bool = False
    # The student's grid [K + 1] where each step has weights of its own; None: one set serves all steps.
    step_times: Tensor | None = None
    # The role (or the step's name) that the shared network serves, and the condition's vector.
    active: list[tuple[str, Tensor | None]] = field(default_factory=lambda: [("teacher", None)])
    averaging: list[bool] = field(default_factory=list)  # holds something while the student has its averaged weights

    @property
    def step_names(self) -> list[str]:
        """The names of the student's sets of weights, usually one."""
        return [step_name("student", k) for k in range(1 if self.step_times is None else len(self.step_times) - 1)]

    @property
    def served(self) -> dict[str, Mapping[str, nn.Parameter]]:
        """What is trained, by the name under which a network serves it."""
        others = {str(role): own for role, own in self.trained.items()}
        return {**others, **{name: self._own(name) for name in self.step_names}}

    def _own(self, name: str) -> Mapping[str, nn.Parameter]:
        """Return the student's parameters of one step."""
        trained = self.trained["student"]
        if self.step_times is None:
            return trained
        if not self.config.lora:
            return {n: p for n, p in trained.items() if n.startswith(f"{name}.")}
        return {n: p for n, p in trained.items() if f".{name}." in n}

    def denoise(self, role: Role, cond: Cond, condition: float | None = None, step: Tensor | None = None) -> Denoise:
        """Return the denoiser of a role, without guidance.

        A role with `condition_values` is conditioned on the step count or guidance scale `condition`
        (default: the first value). A student with weights of its own for each step has those of each sample's `step`,
        [B] or [1] on the CPU, or else those of its time.
        """
        if role == "student" and self.step_times is not None:
            return by_step(self._denoise_own, self.told(cond), self.step_times, step)
        return self._as(role, denoiser(self.backbone, self.networks[role], self.told(cond)), condition)

    def _denoise_own(self, step: int, cond: Cond) -> Denoise:
        name = self.step_names[step]
        return self._as("student", denoiser(self.backbone, self.networks[name], cond), name=name)

    def told(self, cond: Cond) -> Cond:
        """Return conditions with the run's guidance scale.

        Unchanged for networks that take no scale as an input.
        """
        return cond if self.embedded_guidance is None else tell(cond, self.embedded_guidance)

    def teacher(self, cond: Cond, null: Cond, guidance: Guidance) -> Denoise:
        """Return the frozen teacher under guidance."""
        return self._as("teacher", guided(self.backbone, self.networks["teacher"], cond, null, guidance))

    def tokens(self, role: Role, x: Tensor, t: Tensor, cond: Cond, condition: float | None = None) -> list[Tensor]:
        """Return a role's features of noisy states for the discriminator.

        x [B, ...] at t [B]; tokens [B, N, C] of each layer that the backbone names.
        """
        self.activate(role, condition)
        try:
            return features(self.backbone, self.networks[role], x, t, self.told(cond))
        finally:
            self.activate("teacher")

    def _as(self, role: Role, inner: Denoise, condition: float | None = None, name: str = "") -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Split:
            self.activate(role, condition, name)
            try:
                return inner(x, t)
            finally:
                self.activate("teacher")

        return denoise

    def activate(self, role: Role, condition: float | None = None, name: str = "") -> None:
        """Make the shared network serve a role.

        The network serves the role, conditioned on a step count or guidance scale, until another role is
        activated. `name` is that of a set of its weights, where it has several. Between two calls of a role the
        network is the teacher, so other users of the backbone find the teacher.
        """
        vector = None
        if self.condition_values and role != "teacher":
            table = self.trained[role][CONDITION]
            vector = step_condition.vector(self.condition_values, table, condition or self.condition_values[0])
        self._serve((name or role, vector))

    def _serve(self, who: tuple[str, Tensor | None]) -> None:
        """Make the shared network serve a role again.

        The time is the same for any network.
        """
        self.active[0] = who
        role, vector = who
        adapters.switch(self.layers, None if role == "teacher" else role)
        for attached in self.conditions.values():
            attached.active = None
        if vector is not None:
            self.conditions[role].active = vector

    def vectors(self, role: Role = "student") -> dict[float, Tensor]:
        """Return the condition vectors of a role by value.

        The vector of a value is added to the role's time embedding. Empty for a role without a condition.
        """
        return (
            step_condition.vectors(self.condition_values, self.trained[role][CONDITION])
            if self.condition_values
            else {}
        )

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over processes.

        Every call of a sharded network needs all processes, and gradients come from backward passes.
        """
        return sharding.is_sharded(self.backbone.module)

    def sum_gradients(self, wanted: bool) -> None:
        """Set whether backward passes of sharded networks sum gradients over all processes.

        Otherwise each process keeps those of adapters whole, which are small. Those of copies are as large as the
        network: they are summed within each replica.
        """
        for network in {id(n): n for n in self.networks.values()}.values():
            sharding.sum_gradients(network, wanted, keep_whole=self.config.lora)

    def share_tokens(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Share the tokens of every network call among neighbours, see `backbones.context`.

        Before the networks are sharded. Raises ValueError for networks that cannot, and for a head, which computes
        whole samples.
        """
        if self.head is not None or self.head_to_absorb is not None:
            raise ValueError("train.context: got several processes with a head, which takes whole samples; set it to 1")
        for network in {id(n): n for n in self.networks.values()}.values():
            share_tokens(network, mesh, device)

    def shard(
        self, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None = None, from_first: bool = False
    ) -> None:
        """Shard all networks over the processes of `mesh`.

        Blocks are computed in `dtype`, or as they are.
        This process's part, and everything that is not sharded, goes to `device`; see `sharding.shard`. With
        `from_first` the weights are the first process's: the networks of the others may be meta tensors.
        Sharding is permanent: to get whole networks, make new roles. The student can be initialized from
        another student before sharding, not afterwards. Raises ValueError for a quantized base, whose codes
        every process would hold.
        """
        if self.step_times is not None:
            raise ValueError(
                "train.shard: got true, but roles.per_step=true has a process call the weights of its own samples' "
                "steps, and sharded weights need all processes; set one of them to false"
            )
        if self.config.quantize is not None:
            raise ValueError(
                f"train.shard: got true, but roles.quantize={self.config.quantize} is not spread; "
                "set roles.quantize=null or train.shard=false"
            )
        for network in {id(n): n for n in self.networks.values()}.values():
            before = {n: p for n, p in network.named_parameters() if p.requires_grad}
            weights = sharding.empty(network) if from_first else {}
            sharding.shard(network, mesh, device, dtype)
            if from_first and self.on_meta and network is not self.networks["teacher"]:
                sharding.copy_parts(network, self.networks["teacher"], device)
            elif from_first:
                sharding.receive(network, weights, mesh, device)
            after = dict(network.named_parameters())
            for role, own in self.trained.items():
                self.trained[role] = {n: after[n] if before.get(n) is p else p for n, p in own.items()}
        for p in sharding.by_kind([p for own in self.trained.values() for p in own.values()])[1]:
            p.data = p.data.to(device)
        for head in (self.head, self.head_to_absorb):
            if head is not None:
                head.to(device)
        for name, p in self.trained["student"].items():
            self.average[name] = (
                p.detach().float().clone()  # nothing has been trained yet
                if from_first
                else sharding.shard_like(self.average[name], p).to(p.device)
            )

    def update_average(self, decay: float) -> None:
        """Update the student's moving average.

        `average <- decay average + (1 - decay) student`.
        """
        trained = self.trained["student"]
        if sharding.by_kind(list(trained.values()))[0]:
            for name, p in trained.items():
                self.average[name].lerp_(p.detach().float(), 1 - decay)
        elif trained:
            torch._foreach_lerp_(
                [self.average[name] for name in trained], [p.detach().float() for p in trained.values()], 1 - decay
            )

    def start_from(
        self,
        state: Mapping[str, Tensor],
        vectors: Mapping[float, Tensor] = MappingProxyType({}),
        later: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Initialize student and average from another student.

        `state` is the other student's LoRA in PEFT's file format, or the whole network. `vectors` are the
        condition vectors of each step count or scale, which `state` must not contain; without `vectors` the
        condition starts at zero, the same for all values. Where each step has weights of its own, all steps start from
        `state`, or the later ones from theirs. Raises ValueError if the state does not fit.
        """
        states = [state, *later] if later else [state] * len(self.step_names)
        for name, own in zip(self.step_names, states, strict=True):
            self._load(name, own)
        if vectors:
            step_condition.put(self.trained["student"][CONDITION], [vectors[k] for k in self.condition_values])
        for name, p in self.trained["student"].items():
            self.average[name].copy_(p.detach())

    def _load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load one set of the student's weights."""
        network = self.networks[name]
        if self.config.lora:
            adapters.load_adapter(network, name, adapters.scaled(state, 1 / self.config.scale))
        else:
            own = network.state_dict()
            if odd := sorted(
                k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
            ):
                raise ValueError(
                    f"init_from: its weights do not fit this network (first in doubt: {odd[0]}); "
                    "start from a student of the same base"
                )
            network.load_state_dict(state)

    def keep_average_as_fake(self) -> None:
        """Copy the student's current average into the fake score.

        The fake score becomes a frozen copy to imitate.
        """
        fake = self.trained["fake"]
        adapters.assign(fake, dict(zip(fake, self.average.values(), strict=True)))

    @torch.no_grad()
    def pull_fake(self, share: float) -> None:
        """Move the fake score's weights to the student's by a share.

        `psi <- (1 - share) psi + share theta`; of LoRAs each factor, and without the student's head.
        """
        student = self.trained["student"].values()  # in the order of the fake score's, the head last
        for own, other in zip(self.trained["fake"].values(), student, strict=False):
            own.lerp_(other, share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the student's averaged weights within the block.

        For previews, evaluation and export. Within the block `average` holds the weights in training. Blocks
        within the block change nothing.
        """
        if self.averaging:
            yield
            return
        self.averaging.append(True)
        try:
            with adapters.swapped_parameters(self.trained["student"], self.average):
                yield
        finally:
            self.averaging.clear()

    def student_state(self, step: int = 0) -> dict[str, Tensor]:
        """Return the student's current weights, without the step condition.

        The weights are a LoRA in PEFT's file format, or the whole network. A LoRA's scale is part of the
        weights, so the LoRA is right at strength 1.0 also where alpha is not read. Where each step has weights of its
        own, they are those of `step`, from 0.
        """
        name = self.step_names[step]
        network = self.networks[name]
        if self.config.lora and not self.config.rank:
            return {}
        state = network.state_dict()
        if self.config.lora:
            state = adapters.scaled(adapters.adapter_state(network, name), self.config.scale)
        return {k: v.detach().cpu().clone() for k, v in state.items()}


def copied(network: nn.Module, on_meta: bool = False) -> nn.Module:
    """Return a deep copy of a network, with tied weights tied.

    Tensors are cloned, which also works for fake (meta) tensors. A `on_meta` copy has meta tensors.
    """

    def clone(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta") if on_meta else tensor.detach().clone()

    memo: dict[int, Any] = {id(b): clone(b) for b in network.buffers()}
    memo |= {id(p): nn.Parameter(clone(p), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def _require_single(network: nn.Module) -> None:
    """Check that weights to be trained are in single precision or better.

    Raises ValueError for coarser weights, which would lose small updates.
    """
    for name, p in network.named_parameters():
        kind = str(p.dtype).removeprefix("torch.")
        if p.is_complex():
            raise ValueError(f"roles.lora: got false, but {name} is {kind}, which is not trained; set roles.lora=true")
        if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"roles.lora: got false, which trains weights that are {kind} here ({name}) "
                "and would lose updates smaller than their rounding; set dtype to float32 (train.precision bf16 "
                "computes in half of it all the same)"
            )


def make_roles(
    backbone: Backbone,
    config: RolesConfig,
    seed: int = 0,
    condition_values: tuple[float, ...] = (),
    gan_step_counts: tuple[int, ...] = (),
    head: nn.Module | None = None,
    fake: bool = True,
    head_to_absorb: nn.Module | None = None,
    on_meta: bool = False,
    surrogate: bool = False,
    step_times: Tensor | None = None,
) -> Roles:
    """Return a student and a `fake` score that equal the teacher.

    Both equal the teacher bit for bit, also when they are conditioned on `condition_values` (step counts or
    guidance scales).

    `gan_step_counts` makes a discriminator of students of these step counts. `head` becomes part of the
    student; without LoRA (rank 0) the head is all that is trained. `head_to_absorb`, a head that the student
    learns to do without, stays unchanged. A `surrogate` of a reward equals the teacher, too. With the student's grid
    `step_times [K + 1]` the student has weights of its own for each of the K steps, which are equal at first.

    Shared: the backbone's own module gets two adapters without effect, and the base weights stay frozen.
    Adapters of an earlier run on the same backbone are removed, and `config.quantize` quantizes the base
    weights permanently. Copies: two deep copies of the network, which with `on_meta` have no weights before they are
    sharded. The backbone may have meta tensors, which are filled then, too.

    Raises ValueError if there is nothing to train, or for copies of half-precision weights.
    """
    adapters.remove_adapters(backbone.module, (*TRAINED, SURROGATE))
    quantize(backbone, config.quantize)
    set_checkpointing(backbone.module, None)
    base = backbone.module.requires_grad_(False).eval()
    steps = [step_name("student", k) for k in range(1 if step_times is None else len(step_times) - 1)]
    assert step_times is None or (head is None and head_to_absorb is None and not condition_values)
    made: tuple[Role, ...] = (*(TRAINED if fake else TRAINED[:1]), *((SURROGATE,) if surrogate else ()))
    if config.lora and not config.rank and (fake or head is None):
        raise ValueError("roles.rank: got 0, which trains a head alone; choose a rank from 1, e.g. 32")
    if condition_values:
        width = step_condition.width(base, backbone.time_layer)
    if not config.lora:
        _require_single(base)
        networks = {"teacher": base, **{r: copied(base, on_meta) for r in (*made, *steps[1:])}}
        trained: dict[Role, Mapping[str, nn.Parameter]] = {
            r: {n: p for n, p in networks[r].named_parameters() if p.is_floating_point()} for r in made
        }
        if step_times is not None:
            trained["student"] = {
                f"{s}.{n}": p for s in steps for n, p in networks[s].named_parameters() if p.is_floating_point()
            }
        for p in (p for own in trained.values() for p in own.values()):
            p.requires_grad_(True)
        layers: tuple[LoraLayer, ...] = ()
    else:
        if config.rank:
            # The time layer gets the step condition instead of an adapter; export turns the condition into one.
            names = adapters.targets(
                base, config.targets, (*config.exclude, *([backbone.time_layer] if condition_values else []))
            )
            for i, role in enumerate(made):
                for name in steps if role == "student" else [role]:
                    adapters.add_adapter(base, name, config.rank, config.alpha or config.rank, names, seed + i)
        networks = {"teacher": base, **dict.fromkeys((*made, *steps[1:]), base)}
        layers = tuple(adapters.adapter_layers(base))
        trained = {r: adapters.adapter_parameters(base, r) if config.rank else {} for r in made}
        for name in steps[1:]:
            trained["student"] = {**trained["student"], **adapters.adapter_parameters(base, name)}
        for parameters in trained.values():
            for p in parameters.values():
                p.requires_grad_(True)
    conditions: dict[str, StepCondition] = {}
    device = next(base.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    if condition_values:
        for role in made:
            shared = config.lora and bool(conditions)
            conditions[role] = (
                conditions["student"] if shared else step_condition.attach(networks[role], backbone.time_layer)
            )
            trained[role] = {
                **trained[role],
                CONDITION: nn.Parameter(torch.zeros(len(condition_values), width, device=device)),
            }
    if head is not None:
        head.to(device).requires_grad_(True)
        trained["student"] = {**trained["student"], **{f"{HEAD}{n}": p for n, p in head.named_parameters()}}
    if head_to_absorb is not None:
        head_to_absorb.to(device).requires_grad_(False)
    average = {n: p.detach().float().clone() for n, p in trained["student"].items()}
    adapters.switch(layers, None)
    discriminator = make_discriminator(backbone, base, gan_step_counts, seed) if gan_step_counts else None
    if discriminator is not None:
        trained["discriminator"] = dict(discriminator.heads.named_parameters())
    roles = Roles(
        backbone=backbone,
        networks=networks,
        trained=trained,
        layers=layers,
        config=config,
        average=average,
        condition_values=condition_values,
        conditions=conditions,
        discriminator=discriminator,
        head=head,
        head_to_absorb=head_to_absorb,
        on_meta=on_meta and not config.lora,
        step_times=step_times,
    )
    roles.activate("teacher")
    for network in {id(n): n for n in networks.values()}.values() if config.checkpointing else ():
        checkpoint_blocks(network, lambda: roles.active[0], roles._serve)
    return roles
