"""What a few processes train, next to what one does: run as `python -m tests.training.several WHAT COUNT FOLDER`.

Every case takes the same eight batches an iteration, whatever the number of processes. One start of Python makes all
cases; the first process writes what is trained, whole, under the name of the case.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.backbones.base import Backbone, Denoiser
from fewstep.core.schedule import Flow
from fewstep.methods.method import Method
from fewstep.processes import context_mesh, mesh_of
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.roles.sharding import empty
from fewstep.training.loop import TrainConfig

from . import test_sharding as common

BATCHES = 8
CONFIG = replace(common.CONFIG, batch=1, global_batch=BATCHES)


@dataclass(frozen=True)
class Case:
    """One way to share the work of a training."""

    method: str
    lora: bool
    shard: bool
    replicas: int = 1
    from_first: bool = False

    @property
    def name(self) -> str:
        how = f"shard{self.replicas}" if self.shard else "ddp"
        return f"{self.method} {'lora' if self.lora else 'copies'} {how}{' from first' * self.from_first}"


def cases(count: int) -> list[Case]:
    found = [Case("unify", lora, False) for lora in (True, False)]
    found += [Case(m, lora, True) for m in ("unify", "fisher") for lora in (True, False)]
    found += [Case("gan", lora, True, 1, True) for lora in (True, False)]
    if count == 4:
        found += [Case(m, lora, True, 2, m == "unify") for m in ("unify", "fisher") for lora in (True, False)]
    return found


RESUMED = (Case("unify", True, False), Case("unify", False, True), Case("gan", True, True, 1, True))
MEASURED = "small batch"
STOPPED = 2  # iterations of those that others go on with


def trained(case: Case, config: TrainConfig = CONFIG, run: Path | None = None) -> Roles:
    """Train one case in this process, which may be the only one."""
    method, alone = common.METHODS[case.method], not distributed.is_initialized()
    backbone = common.deep()
    if not alone and case.from_first and distributed.get_rank():
        empty(backbone.module)  # this process has never read the weights
    roles = roles_of(backbone, method, case)
    if case.shard and not alone:
        roles.shard(mesh_of(case.replicas), torch.device("cpu"), from_first=case.from_first)
    common.trained(roles, method, run, config)
    return roles


def roles_of(backbone: Backbone, method: Method, case: Case, rank: int = 2) -> Roles:
    against = method.counts if method.needs.adversary else ()
    config = RolesConfig(lora=case.lora, rank=rank)
    values = method.condition_values
    return make_roles(backbone, config, 0, values, against, None, method.needs.fake, on_meta=case.from_first)


def stopped(case: Case, run: Path) -> None:
    """Train the first iterations of a case, up to a checkpoint in `run`."""
    trained(case, replace(CONFIG, iterations=STOPPED, shard=case.shard), run)


def straight(count: int, folder: Path) -> None:
    """Train all cases."""
    for case in cases(count):
        keep(trained(case), folder / f"{case.name}.safetensors")


def resume(count: int, folder: Path) -> None:
    """Go on with the runs in `folder/begun`, and begin others in `folder/left`."""
    for case in RESUMED:
        own = replace(case, replicas=2) if case.shard and count == 4 else case
        keep(trained(own, CONFIG, folder / "begun" / case.name), folder / f"{case.name}.safetensors")
        stopped(own, folder / "left" / case.name)


class Moved(TorchDispatchMode):
    """Bytes that this process sends, as the collectives say that it calls, in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {"gather": 0, "scatter": 0, "sum": 0}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        ops = torch.ops.c10d
        if func is ops._allgather_base_.default:
            self._add("gather", args[0], args[2], 1)
        elif func is ops._reduce_scatter_base_.default:
            self._add("scatter", args[1], args[2], 1)
        elif func is ops.allreduce_.default:
            self._add("sum", args[0][0], args[1], 2)
        return func(*args, **(kwargs or {}))

    def _add(self, what: str, tensor: Tensor, group: Any, times: int) -> None:
        count = distributed.ProcessGroup.unbox(group).size()
        # Not what says whether numbers are finite, or the norm.
        self.sent[what] += times * tensor.nbytes * (count - 1) / count if tensor.numel() > 1 else 0


class Calls:
    """The number of calls of some networks."""

    count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


class Even(common.Deep):
    """A denoiser whose blocks any two or four processes share in equal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)) for _ in range(3)
        )


def measure(count: int, folder: Path) -> None:
    """Count what each way to share the work sends in an iteration, next to its network calls."""
    method = common.METHODS[MEASURED]
    for case in cases(count):
        if case.method != "unify" or case.from_first:
            continue
        roles = roles_of(common.deep(Even), method, case, rank=4)
        if case.shard:
            roles.shard(mesh_of(case.replicas), torch.device("cpu"), from_first=case.from_first)
        calls = Calls()
        for network in {id(n): n for n in roles.networks.values()}.values():
            network.register_forward_pre_hook(calls)
        config = replace(CONFIG, iterations=1, global_batch=2 * count)
        with Moved() as moved:
            common.trained(roles, method, config=config)
        if distributed.get_rank() == 0:
            (folder / f"{case.name}.json").write_text(json.dumps({**moved.sent, "calls": calls.count}))


class Video(WanTransformer3DModel):
    """A tiny Wan as a network of one's own."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, text, return_dict=False)[0]


def letters(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return four tokens of a prompt's first letters."""
    ids = torch.tensor([[ord(c) % 32 for c in f"{p:<4}"[:4]] for p in prompts])
    return {"text": torch.sin(ids[..., None] * torch.arange(1, 9))}


VIDEO = replace(CONFIG, iterations=2, batch=2, global_batch=4, shard=True, context=2)


def video() -> Roles:
    """Return student and fake score of a tiny Wan as adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Video(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip
    backbone = Denoiser(network.requires_grad_(False).eval(), Flow(), (4, 2, 8, 8), "flow", letters)
    return make_roles(backbone, RolesConfig(rank=2, checkpointing=True))


def context(count: int, folder: Path) -> None:
    """Train with samples whose tokens two neighbours share."""
    roles = video()
    roles.share_tokens(context_mesh(2), torch.device("cpu"))
    roles.shard(mesh_of(1), torch.device("cpu"))
    metrics = common.trained(roles, common.METHODS[MEASURED], config=VIDEO)
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(metrics))


def keep(roles: Roles, path: Path) -> None:
    found = common.weights(roles)
    same_everywhere(found)
    if distributed.get_rank() == 0:
        save_file(found, path)


def work(what: str, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    {"straight": straight, "resume": resume, "measure": measure, "context": context}[what](count, Path(folder))


def same_everywhere(found: dict[str, Tensor]) -> None:
    """Check that all processes have the same weights, bit for bit."""
    for name, tensor in found.items():
        first = tensor.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), name


if __name__ == "__main__":
    debug_launcher(work, args=(sys.argv[1], int(sys.argv[2]), sys.argv[3]), num_processes=int(sys.argv[2]))
