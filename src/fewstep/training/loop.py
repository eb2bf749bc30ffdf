"""The training loop.

The loop is a generator that yields after every iteration. A run resumes from checkpoints, on a CPU bit for
bit.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..backbones.generate import device_of, require_seed
from ..config_fields import POSITIVE, WEIGHT, Range, check_fields
from ..data.images import ImageData
from ..data.prompts import Embeddings
from ..data.trajectories import Trajectories
from ..methods.method import MOST_BATCH, Loss, Method, TrainBatch
from ..processes import any_rank, is_first, meet, require_same, this_process
from ..roles.adapters import assign
from ..roles.roles import Role, Roles
from ..roles.sharding import clip_gradients, shard_like
from ..transfer import fetched, together
from ..words import speaks_python
from .compiling import Compiled
from .gradients import Gradients
from .optimizer import OptimizerName, make_optimizer, step_unless
from .parts import load_parts, require_intact
from .precision import Precision, computing, lay_out, require_workspace
from .saving import CheckpointWriter, checkpoint_writer
from .settings import require_unchanged, settings_of
from .state import (
    PARTS,
    checkpoints,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    require_optimizer_tensors,
    save_checkpoint,
    seeded,
)

Found = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]  # the tensors and the state of a checkpoint

LORA_RATES, COPY_RATES = (1e-4, 1e-3), (1e-5, 1e-4)  # default rates of student and fake score


@speaks_python("train")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, and at which rates a student trains.

    Raises ValueError for invalid settings.
    """

    iterations: Annotated[int, Range(1)]
    """Iterations, the fake score's warm-up included."""

    batch: Annotated[int, Range(1, MOST_BATCH)] = 16
    """Samples in a batch, of each process."""

    lr: Annotated[float, POSITIVE] | None = None
    """Learning rate of the student; by default 1e-4 for a LoRA, 1e-5 for all weights."""

    fake_lr: Annotated[float, POSITIVE] | None = None
    """Learning rate of the fake score and the discriminator; by default 1e-3 for a LoRA, 1e-4 for all weights."""

    decay: Annotated[int, Range(0)] = 0
    """Iterations at the end, and of a warm-up that absorbs a head, in which the student's rate falls linearly to
    zero."""

    lr_warmup: Annotated[int, Range(0)] = 0
    """Updates at the beginning in which every role's rate rises linearly from zero."""

    accumulate: Annotated[int, Range(1, MOST_BATCH)] = 1
    """Batches of an iteration, one after the other: the memory of one, the update of all."""

    global_batch: Annotated[int, Range(1)] | None = None
    """Samples of an iteration over all processes: train.accumulate follows from their number, and the training is the
    same in any number of them; by default batch times accumulate times processes."""

    ema: Annotated[float, Range(0, 1, below=True)] = 0.98
    """Decay of the student's average; 0 is off."""

    betas: tuple[Annotated[float, Range(0, 1, below=True)], Annotated[float, Range(0, 1, below=True)]] = (0.0, 0.999)
    """Adam's betas."""

    weight_decay: Annotated[float, WEIGHT] = 0.0
    """Decoupled weight decay."""

    clip: Annotated[float, POSITIVE] = 1.0
    """Largest norm of a gradient."""

    checkpoint_every: Annotated[int, Range(1)] = 100
    """Iterations between two checkpoints."""

    keep: Annotated[int, Range(1)] = 2
    """Checkpoints that stay, the newest; an older one goes when a newer one is whole."""

    seed: int = 0
    """Seed of every draw."""

    precision: Precision = "no"
    """bf16: the networks compute in it, weights and losses stay in single precision."""

    shard: bool = False
    """Share all weights and optimizer states between processes (FSDP2); one process ignores it."""

    replicas: Annotated[int, Range(1)] = 1
    """With shard, copies of the weights: each is shared by neighbouring processes, those of one machine where it is the
    number of machines (HSDP)."""

    context: Annotated[int, Range(1)] = 1
    """With shard, neighbouring processes that share the tokens of each sample (context parallelism): a part of the
    activations in each."""

    optimizer: OptimizerName = "adamw"
    """adamw8bit keeps its moments in 8 bits: a quarter of their memory, and another result."""

    compile: bool = False
    """Compile the blocks that the networks repeat (torch.compile): every run starts more slowly, for iterations that
    may be faster on a GPU."""

    deterministic: bool = False
    """Compute with deterministic algorithms alone: slower on a GPU, where a resumed run then equals the uninterrupted
    one bit for bit. On a CPU it always does."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        require_seed(self.seed, "train.seed")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(
                f"train.shard: got true, but {self.optimizer} takes whole tensors; set train.optimizer=adamw"
            )
        if self.replicas > 1 and not self.shard:
            raise ValueError(
                f"train.replicas: got {self.replicas}, which are replicas of sharded weights; set train.shard=true, or "
                "leave it out: without sharding every process has all weights"
            )
        if self.context > 1 and not self.shard:
            raise ValueError(
                f"train.context: got {self.context}, which needs processes that make every network call together; "
                "set train.shard=true"
            )
        if self.global_batch is not None and self.accumulate != 1:
            raise ValueError(
                f"train.accumulate: got {self.accumulate} with train.global_batch={self.global_batch}, from which it "
                "follows; set one of them alone"
            )
        for option in ("decay", "lr_warmup"):
            if (got := getattr(self, option)) > self.iterations:
                raise ValueError(
                    f"train.{option}: got {got}, allowed are whole numbers from 0 (off) to train.iterations "
                    f"({self.iterations}); set train.{option}=0, or train.iterations to {got} or more"
                )

    def groups(self, processes: int, option: str = "train") -> int:
        """Return how many of so many processes take samples of their own.

        Neighbours that share tokens take the same samples. Raises ValueError where they do not come out even.
        """
        if processes > 1 and processes % self.context:
            raise ValueError(
                f"{option}.context: got {self.context}, allowed are divisors of the number of processes, {processes}"
            )
        return max(1, processes // self.context)

    def on(self, processes: int, option: str = "train") -> "TrainConfig":
        """Return the settings in so many processes.

        `accumulate` follows from `global_batch`, which is then None. Raises ValueError for a `global_batch` that
        the processes cannot share in equal batches.
        """
        groups = self.groups(processes, option)
        if self.global_batch is None:
            return self
        count, rest = divmod(self.global_batch, self.batch * groups)
        if rest:
            share, uneven = divmod(self.global_batch, groups)
            context = "" if self.context == 1 else f", over {option}.context={self.context}"
            batch = max(k for k in range(1, min(self.batch, share or 1) + 1) if share % k == 0)
            raise ValueError(
                f"{option}.global_batch: got {self.global_batch}, allowed are multiples of {option}.batch={self.batch} "
                f"times the number of processes, {processes}{context}; "
                + ("start a number of processes that divides it" if uneven else f"set {option}.batch={batch}")
            )
        return replace(self, accumulate=count, global_batch=None)

    def rates(self, share: bool) -> tuple[float, float]:
        """Return the learning rates of student and fake score."""
        student, fake = LORA_RATES if share else COPY_RATES
        return student if self.lr is None else self.lr, fake if self.fake_lr is None else self.fake_lr

    def lr_at(self, role: Role, iteration: int, warmup: int = 0, share: bool = True) -> float:
        """Return the learning rate of a role in an iteration, from 0.

        The student's own updates begin after `warmup`.
        """
        lr, fake_lr = self.rates(share)
        if role == "student" and iteration < warmup:
            return lr * (warmup - iteration) / warmup
        updates = iteration - warmup if role == "student" else iteration
        rise = min(1.0, (updates + 1) / self.lr_warmup) if self.lr_warmup else 1.0
        fall = min(1.0, (self.iterations - iteration) / self.decay) if self.decay and role == "student" else 1.0
        return rise * fall * (lr if role == "student" else fake_lr)


@dataclass(frozen=True)
class Step:
    """The result of one iteration.

    `metrics` are plain numbers; `roles` gives access to every network.
    """

    iteration: int
    metrics: Mapping[str, float]
    seconds: float  # of this iteration alone
    roles: Roles
    method: Method


def default_device() -> torch.device:
    """Return this process's own GPU, or the CPU."""
    device = this_process().device
    # Times are float64, which Apple's GPUs do not support.
    return device if device.type in ("cuda", "xpu") else torch.device("cpu")


def require_updates(method: Method, iterations: int) -> None:
    """Check that a training reaches the student's first update.

    Raises ValueError otherwise.
    """
    if iterations <= method.warmup:
        raise ValueError(
            f"train.iterations: got {iterations}, of which the first {method.warmup} (method.warmup) do not train "
            "the student; set more than these"
        )


def require_groups(method: Method, batch: int) -> None:
    """Check that a batch holds whole groups of one prompt.

    Raises ValueError otherwise.
    """
    if batch % method.group:
        raise ValueError(
            f"train.batch: got {batch}, allowed are multiples of method.reward.group ({method.group}), whose images "
            f"have one prompt; set it to {-(-batch // method.group) * method.group}"
        )


def require_trajectories(method: Method, given: bool) -> None:
    """Check that a method gets trajectories if it needs them.

    Raises ValueError for needed trajectories that are missing, and for trajectories that the method does not take.
    """
    if method.needs.trajectories != given:
        needs, cure = (
            ("needs", "set it to trajectories") if method.needs.trajectories else ("takes no", "leave data out")
        )
        raise ValueError(f"data.source: method {method.name} {needs} trajectories of the teacher; {cure}")


def require_images(method: Method, given: bool) -> None:
    """Check that a method gets images if it needs them.

    Raises ValueError for needed images that are missing, and for images that the method does not take.
    """
    if method.needs.images != given:
        needs, cure = (
            ("needs images", "pass a folder of captioned ones, or teacher for the teacher's own")
            if method.needs.images
            else (
                "is trained from prompts alone, which images need method.gan.weight above 0 to change",
                "leave data out",
            )
        )
        raise ValueError(f"data.source: method {method.name} {needs}; {cure}")


def _require_plain(method: Method, context: int) -> None:
    """Check that processes may share the tokens of samples.

    They may where no loss has a gradient through a chain of calls. Raises ValueError.
    """
    if context > 1 and (method.needs.adversary or not method.separate):
        which = "method.gan" if method.needs.adversary else "method.match.divergence"
        raise ValueError(
            f"train.context: got {context}, but the student's gradient passes a second network ({which}); set it to 1"
        )


def distill(
    roles: Roles,
    method: Method,
    data: Embeddings,
    config: TrainConfig,
    run: Path | None = None,
    real: ImageData | None = None,
    paths: Trajectories | None = None,
    resumed: Callable[[Step], None] = lambda step: None,
) -> Generator[Step, None, None]:
    """Train the student in `roles`, yielding a `Step` per iteration.

    The caller may inspect, log or stop at any step. `resumed` is called with the checkpoint's own step after
    the roles are restored, so that the caller can redo what a kill interrupted in that iteration.

    With `run`, checkpoints are written to this folder while the training goes on, the last one before the last
    step is yielded, and another call with the same settings resumes from
    the newest checkpoint. Every draw is seeded by (seed, iteration, rank), so the resumed run equals the
    uninterrupted run: bit for bit on a CPU of the same machine, and on a GPU with `config.deterministic`; without
    it a GPU's rounding differs. A finished run yields the last step again, without `seconds`.

    Training runs on the network's device; sharded roles train in all processes together. Raises ValueError if
    the checkpoint belongs to other settings, which the message names, and FloatingPointError at a non-finite
    loss or gradient (the last checkpoint stays).
    """
    with nullcontext() if run is None else checkpoint_writer(run, config.keep) as writer:
        yield from _iterations(roles, method, data, config, run, real, paths, resumed, writer)


def _iterations(
    roles: Roles,
    method: Method,
    data: Embeddings,
    config: TrainConfig,
    run: Path | None,
    real: ImageData | None,
    paths: Trajectories | None,
    resumed: Callable[[Step], None],
    writer: CheckpointWriter | None,
) -> Generator[Step, None, None]:
    """Train as `distill` does, with a writer of checkpoints."""
    accelerator = Accelerator()
    config = config.on(accelerator.num_processes)
    device, groups = device_of(roles.backbone.module), config.groups(accelerator.num_processes)
    rank = accelerator.process_index * groups // accelerator.num_processes  # neighbours that share tokens have the same
    _require_plain(method, accelerator.num_processes // groups)
    require_trajectories(method, paths is not None)
    require_images(method, real is not None)
    require_updates(method, config.iterations)
    require_groups(method, config.batch)
    if method.needs.reward != (roles.reward is not None):
        raise ValueError(
            f"reward: method {method.name} {'needs' if method.needs.reward else 'takes no'} reward; "
            "it has one where method.reward.weight is above 0"
        )
    require_workspace(config.deterministic, device)

    def optimizer_of(role: Role) -> torch.optim.Optimizer:
        return make_optimizer(
            list(roles.trained[role].values()),
            config.optimizer,
            config.lr_at(role, 0, 0, roles.config.lora),
            config.betas,
            config.weight_decay,
        )

    if config.optimizer == "adamw":  # 8-bit moments share a scale with their neighbours in memory
        lay_out(roles, config.precision, device)
    optimizers = {role: optimizer_of(role) for role in roles.trained}
    batches = config.accumulate * groups
    several = accelerator.num_processes > 1
    settings = {} if run is None and not several else settings_of(roles, method, data, config, batches, real, paths)
    if several:
        require_same({"train.iterations": config.iterations, **settings})
    found = None if run is None else latest_checkpoint(run, whole=not roles.sharded)
    start = _resume(roles, optimizers, run, found, settings, batches, config.batch)
    if several:
        require_same({"checkpoint": start})
    if found is not None:
        last = Step(start, found[1].get("metrics", {}), found[1].get("seconds", 0.0), roles, method)
        del found
        resumed(last)
        if start >= config.iterations:
            yield replace(last, seconds=0.0)
            return
    null, reach = data.unconditional(device), Reach()
    gradients = Gradients(roles, config.accumulate, accelerator.num_processes, groups, method.separate, reach)

    def draw(i: int) -> list[TrainBatch]:
        """Draw the batches of an iteration and send them to the device."""
        turns, steps = list[TrainBatch](), method.count_at(i, config.iterations, seeded(config.seed, i, "count"))
        for part in range(config.accumulate):
            stream = rank * config.accumulate + part
            rng = seeded(config.seed, i, "draw", stream, device)
            host = rng if rng.device.type == "cpu" else seeded(config.seed, i, "host", stream)
            chosen = data.choose(config.batch, seeded(config.seed, i, "prompts", stream), method.group)
            cond = data.at(chosen, device)
            prompts = tuple(data.prompts[k] for k in chosen.tolist()) if method.needs.reward else ()
            images = None if real is None else real.draw(config.batch, seeded(config.seed, i, "real", stream), device)
            walk = None if paths is None else paths.draw(config.batch, seeded(config.seed, i, "paths", stream), device)
            turns.append(
                TrainBatch(i, config.iterations, config.batch, cond, null, images, rng, walk, steps, host, prompts)
            )
        return turns

    following = draw(start)
    compiled = Compiled(roles.networks.values(), device).switched_on if config.compile else nullcontext
    for i in range(start, config.iterations):
        began = time.perf_counter()
        if writer is not None:
            writer.check()
        if i == method.warmup and roles.head_to_absorb is not None:
            # Reset the optimizer: the moments are from absorbing the head, not from the method.
            optimizers["student"] = optimizer_of("student")
        for role, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(role, i, method.warmup, roles.config.lora)
        turns = following
        numerics = computing(config.precision, device, roles, config.deterministic)
        with numerics, compiled():
            measured = _updates(
                [method.losses(roles, turn) for turn in turns], gradients, roles, optimizers, config, i, reach
            )
        if i + 1 < config.iterations:  # while the device still computes
            following = draw(i + 1)
        try:
            numbers = measured.read()
        except FloatingPointError as error:
            if writer is not None:
                with suppress(OSError):
                    writer.wait()  # the message names the last checkpoint
            raise FloatingPointError(f"{error}{_and_then(run)}") from error
        method.after(roles, i)
        if i >= method.warmup:
            # A young average decays faster, so that the average never holds the start.
            done = i - method.warmup + 1
            roles.update_average(min(config.ema, done / (done + 9)))
        # All processes contribute sharded weights, and the first process writes.
        writes = accelerator.is_main_process or roles.sharded
        state = {"settings": settings, "batches": batches, "metrics": numbers, "seconds": time.perf_counter() - began}
        saved = run is None or (i + 1) % config.checkpoint_every == 0 or i + 1 == config.iterations
        if writer is not None and saved and writes:
            save_run(roles, optimizers, writer, i + 1, state)
        if writer is not None and i + 1 == config.iterations:
            writer.wait()
        try:
            yield Step(i + 1, numbers, time.perf_counter() - began, roles, method)
        except GeneratorExit:
            # The caller stops: save the last iteration.
            if writer is not None and not saved and writes:
                save_run(roles, optimizers, writer, i + 1, state)
            raise
        if several:
            meet()  # the first process may have sampled and measured


class Reach:
    """Which tensors of a role the losses have reached.

    One iteration is not enough to decide: an analytic first step trains the head alone.
    """

    PATIENCE = 8  # updates of a role before the check

    def __init__(self) -> None:
        self.reached: dict[Role, set[str]] = {}
        self.seen: dict[Role, int] = {}

    def add(self, role: Role, names: Iterable[str]) -> None:
        """Add the names of tensors that have a gradient."""
        self.reached.setdefault(role, set()).update(names)

    def check(self, roles: Roles, updated: Iterable[Role]) -> None:
        """Check that losses reach at least half of a role's parameters.

        The check happens after `PATIENCE` updates of a role. Some layers of a network may have no part in the
        output; if most layers have none, gradients are being lost. Where each step has weights of its own, a small
        batch may have had no sample of a step, whose weights do not count. Raises ValueError.
        """
        for role in dict.fromkeys(updated):
            self.seen[role] = self.seen.get(role, 0) + 1
            reached, parameters = self.reached.get(role, set()), roles.trained[role]
            if role == "student" and roles.step_times is not None:
                sets = [own for name in roles.step_names if reached & (own := roles.served[name]).keys()]
                parameters = {n: p for own in sets for n, p in own.items()} or parameters
            lost = [n for n in parameters if n not in reached]
            if self.seen[role] == self.PATIENCE and 2 * sum(parameters[n].numel() for n in lost) > sum(
                p.numel() for p in parameters.values()
            ):
                raise ValueError(
                    f"train: the {role}'s loss reaches {len(parameters) - len(lost)} of {len(parameters)} trained "
                    f"tensors, not {lost[0]}; "
                    "check that the network computes with gradients, or set train.precision=no"
                )


class Measured:
    """The numbers of an iteration, counted from 0.

    The CPU reads the numbers from the device once, at the end of the iteration. Losses and norms of gradients have
    to be finite. From the first that is not, the optimizers' steps are left out, so weights that were good stay
    good although the CPU learns of it at the end.
    """

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.checked: list[tuple[Role, str, Tensor]] = []
        self.metrics: dict[str, Tensor] = {}

    def check(self, value: Tensor, what: str, role: Role) -> None:
        """Add a number that has to be finite."""
        self.checked.append((role, what, value.detach()))

    def failed(self) -> Tensor:
        """Return 1 if a number so far is not finite, else 0.

        On the device, float32.
        """
        return (~together([value for _, _, value in self.checked]).isfinite().all()).float()

    def read(self) -> dict[str, float]:
        """Return the metrics as plain numbers.

        Raises FloatingPointError at the first number that is not finite.
        """
        values = fetched([*(value for _, _, value in self.checked), *self.metrics.values()])
        for (role, what, _), value in zip(self.checked, values, strict=False):
            if not math.isfinite(value):
                # The student's own rate breaks the fake score as well: the student's samples are what the score is
                # trained on.
                option = "train.lr" if role == "student" else "train.lr or train.fake_lr"
                raise FloatingPointError(
                    f"the {role} {what} is {value} at iteration {self.iteration + 1}; lower {option}"
                )
        return dict(zip(self.metrics, values[len(self.checked) :], strict=True))


def _updates(
    losses: Sequence[Iterator[Loss]],
    gradients: Gradients,
    roles: Roles,
    optimizers: Mapping[Role, torch.optim.Optimizer],
    config: TrainConfig,
    i: int,
    reach: Reach,
) -> Measured:
    """Make all updates of one iteration.

    Each update uses the mean gradient over the batches in `losses`. Returns what to log, also as means. The
    batches take turns: where a method's updates go together, only one batch at a time holds what gradients
    need.
    """
    measured, seen, norms = Measured(i), dict[str, list[Tensor]](), dict[str, Tensor]()
    moved: list[Role] = []
    while True:
        updated: list[Role] = []
        for k, batch in enumerate(losses, 1):
            for loss in batch:
                measured.check(loss.value, "loss", loss.role)
                if loss.role not in updated:
                    updated.append(loss.role)
                gradients.add(loss, last=k == len(losses))
                for name, value in loss.metrics.items():
                    seen.setdefault(name, []).append(value)
                if not loss.together:
                    break
        if not updated:
            reach.check(roles, moved)
            measured.metrics = {n: v[0] if len(v) == 1 else torch.stack(v).mean() for n, v in seen.items()} | norms
            return measured
        moved += updated
        for role in updated:
            norms[f"{role}_grad"] = _update(gradients, role, roles, optimizers[role], config, measured)


def _update(
    gradients: Gradients,
    role: Role,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    measured: Measured,
) -> Tensor:
    """Take one optimizer step of one role.

    The step is left out where a number so far is not finite.

    Returns the gradient norm.
    """
    parameters = list(roles.trained[role].values())
    gradients.finish(role)
    norm = clip_gradients(parameters, config.clip)
    measured.check(norm, "gradient", role)
    step_unless(measured.failed(), optimizer)
    torch.clear_autocast_cache()  # cached casts of the old weights
    optimizer.zero_grad(set_to_none=True)  # free the gradients before the next iteration
    return norm


def _and_then(run: Path | None) -> str:
    """Return the advice after a number that is not finite.

    A run keeps its learning rates, so lower rates need another folder.
    """
    if run is None:
        return ""
    kept = "" if not (found := checkpoints(run)) else f" ({found[-1].name} of {run} is intact)"
    return f", and choose another --out{kept}"


def save_run(
    roles: Roles,
    optimizers: Mapping[Role, torch.optim.Optimizer],
    writer: CheckpointWriter,
    iteration: int,
    state: Mapping[str, Any],
) -> None:
    """Save every trained role, optimizer and average as a checkpoint.

    The checkpoint is atomic. The first process writes, beside the training, and tensors go to the CPU one by one. For
    sharded roles all processes have to call, each writes its part, and all wait for it.
    """
    groups = _groups(roles, optimizers)
    if roles.sharded and this_process().num_processes > 1:
        writer.wait()
        save_checkpoint(writer.run, iteration, groups, state, writer.keep, in_parts=True)
    elif is_first():
        writer.save(iteration, groups, state)


def _groups(roles: Roles, optimizers: Mapping[Role, torch.optim.Optimizer]) -> dict[str, Mapping[str, Tensor]]:
    """Return the run's own tensors, as a checkpoint groups them."""
    groups: dict[str, Mapping[str, Tensor]] = {"average": roles.average}
    for role in roles.trained:
        groups[role] = {n: p.detach() for n, p in roles.trained[role].items()}
        groups[f"optimizer_{role}"] = optimizer_tensors(optimizers[role], _names(optimizers[role], roles.trained[role]))
    return groups


def _load_own_parts(
    roles: Roles, optimizers: Mapping[Role, torch.optim.Optimizer], folder: Path, hashes: Mapping[str, str]
) -> None:
    """Restore what this process holds from a checkpoint in parts.

    Each process checks some of the files. Raises ValueError in every process if a file is damaged.
    """
    state, damage = this_process(), ""
    try:
        require_intact(folder, hashes, sorted(hashes)[state.process_index :: state.num_processes])
    except ValueError as error:
        damage = str(error)
    if any_rank(bool(damage), starting=True):
        raise ValueError(
            f"checkpoint {folder} is damaged or incomplete ({damage or 'see what another process says'}); "
            "delete that folder to go on from an older one"
        )
    load_parts(folder, _groups(roles, optimizers))


def _names(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of an optimizer's parameters, in the optimizer's order."""
    known = {id(p): n for n, p in parameters.items()}
    return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _resume(
    roles: Roles,
    optimizers: Mapping[Role, torch.optim.Optimizer],
    run: Path | None,
    found: Found | None,
    settings: Mapping[str, Any],
    batches: int,
    batch: int,
) -> int:
    """Restore the checkpoint that was found, and return the iteration.

    Returns 0 without a checkpoint. Raises ValueError for a checkpoint of other settings.
    """
    if found is None:
        return 0
    groups, state = found
    if (before := state.get("batches", batches)) != batches:
        raise ValueError(
            f"train.global_batch: run {run} takes {before} batches of {batch} an iteration, here it is {batches}; "
            f"set it to {before * batch}, which is the same in any number of processes, and leave train.accumulate out"
        )
    require_unchanged(state.get("settings"), settings, str(run))
    if not groups and run is not None:
        _load_own_parts(roles, optimizers, checkpoints(run)[-1], state[PARTS])
        return int(state["step"])
    place, names = (
        f"run {run}: the checkpoint of iteration {state['step']}",
        {r: _names(optimizers[r], roles.trained[r]) for r in roles.trained},
    )
    trained: dict[str, Mapping[str, Tensor]] = {
        "average": roles.average,
        **{str(r): own for r, own in roles.trained.items()},
    }
    for group, wanted in trained.items():
        if odd := sorted({*wanted} ^ {*groups.get(group, {})}):
            raise ValueError(
                f"{place} does not fit what is trained, at {group}/{odd[0]}; "
                "delete that folder to go on from an older one"
            )
    for role in roles.trained:
        require_optimizer_tensors(
            optimizer_tensors(optimizers[role], names[role]), groups.get(f"optimizer_{role}", {}), place
        )
    _put_back(roles, groups)
    for role in roles.trained:
        load_optimizer_tensors(optimizers[role], names[role], groups[f"optimizer_{role}"])
    return int(state["step"])


def restore(roles: Roles, run: Path) -> None:
    """Restore new roles from the newest checkpoint, for inspection.

    Raises ValueError if there is no checkpoint.
    """
    if (found := latest_checkpoint(run)) is None:
        raise ValueError(f"run {run}: has no checkpoint; run the same command again")
    _put_back(roles, found[0])


def _put_back(roles: Roles, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    for role in roles.trained:
        assign(roles.trained[role], groups[role])
    for name, tensor in roles.average.items():
        tensor.copy_(shard_like(groups["average"][name], tensor))
