"""What a few processes train, next to what one does: run as `python -m tests.training.several COUNT FOLDER`.

Every case takes the same four batches an iteration, whatever the number of processes. One start of Python makes all
cases; the first process writes what is trained, whole, under the name of the case.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import debug_launcher
from safetensors.torch import save_file
from torch import Tensor, distributed

from fewstep.methods.method import Method
from fewstep.processes import mesh_of
from fewstep.roles.roles import Roles, make_roles
from fewstep.roles.sharding import empty
from fewstep.training.loop import TrainConfig

from . import test_sharding as common

BATCHES = 4
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


def trained(case: Case, config: TrainConfig = CONFIG) -> Roles:
    """Train one case in this process, which may be the only one."""
    method, alone = common.METHODS[case.method], not distributed.is_initialized()
    backbone = common.deep()
    if not alone and case.from_first and distributed.get_rank():
        empty(backbone.module)  # this process has never read the weights
    roles = roles_of(backbone, method, case)
    if case.shard and not alone:
        roles.shard(mesh_of(case.replicas), torch.device("cpu"), from_first=case.from_first)
    common.trained(roles, method, config=config)
    return roles


def roles_of(backbone: common.Backbone, method: Method, case: Case) -> Roles:
    against = method.counts if method.needs.adversary else ()
    config = common.RolesConfig(lora=case.lora, rank=2)
    values = method.condition_values
    return make_roles(backbone, config, 0, values, against, None, method.needs.fake, hollow=case.from_first)


def work(count: int, folder: str) -> None:
    torch.set_num_threads(1)
    for case in cases(count):
        found = common.weights(trained(case))
        same_everywhere(found)
        if distributed.get_rank() == 0:
            save_file(found, Path(folder) / f"{case.name}.safetensors")


def same_everywhere(found: dict[str, Tensor]) -> None:
    """Check that all processes have the same weights, bit for bit."""
    for name, tensor in found.items():
        first = tensor.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), name


if __name__ == "__main__":
    debug_launcher(work, args=(int(sys.argv[1]), sys.argv[2]), num_processes=int(sys.argv[1]))
