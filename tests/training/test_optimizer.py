"""AdamW in 8 bits: what it holds, where its package is missing, and resuming bit for bit where it is there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone
from fewstep.data.prompts import Embeddings, embed
from fewstep.roles.roles import TRAINED, Roles, RolesConfig, make_roles
from fewstep.training import optimizer as module
from fewstep.training.ledger import storage_bytes
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.memory import training_bytes
from fewstep.training.optimizer import make_optimizer, require, state_bytes
from fewstep.training.state import checkpoints

from .. import tiny
from .common import CONFIG, METHOD, tensors, wait_for

EIGHT = replace(CONFIG, optimizer="adamw8bit")


def wide() -> Backbone:
    """A network whose LoRA of rank 8 has more than 4096 numbers in a tensor."""
    torch.manual_seed(0)
    return replace(tiny.denoiser(), module=tiny.Net(512))


def parts() -> tuple[Roles, Embeddings]:
    backbone = wide()
    return make_roles(backbone, RolesConfig(rank=8)), embed(backbone, tiny.WORDS, None, "tiny")


def test_what_is_held_for_a_parameter() -> None:
    """AdamW's two moments take 8 bytes or 2 a number.

    In single precision they take 8, in 8 bits 2 and two scales for 256 numbers; small tensors stay as they were.
    """
    large, odd, small = (nn.Parameter(torch.zeros(n)) for n in (8192, 5000, 100))
    assert state_bytes([large, odd, small], "adamw") == 8 * (8192 + 5000 + 100)
    assert state_bytes([large], "adamw8bit") == 2 * 8192 + 2 * 4 * 32
    assert state_bytes([odd], "adamw8bit") == 2 * 5000 + 2 * 4 * 20
    assert state_bytes([small], "adamw8bit") == 8 * 100


def test_its_plan_needs_no_package_and_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    planned = {}
    for config in (CONFIG, EIGHT):
        backbone = wide()
        data = embed(backbone, tiny.WORDS, None, "tiny")
        planned[config.optimizer] = training_bytes(
            backbone,
            partial(make_roles, backbone, RolesConfig(rank=64)),
            METHOD,
            METHOD.times(backbone.schedule),
            config,
            data,
        )
    plain, eight = planned["adamw"], planned["adamw8bit"]
    assert eight.optimiser < 0.27 * plain.optimiser
    assert plain.total - eight.total == plain.optimiser - eight.optimiser


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    require("adamw")
    line = (
        r"^train\.optimizer: adamw8bit needs the package bitsandbytes; "
        r"run: pip install 'fewstep\[train8bit\]', or set it to adamw$"
    )
    with pytest.raises(ValueError, match=line):
        next(distill(*parts()[:1], METHOD, parts()[1], EIGHT))
    with pytest.raises(ValueError, match=r"^optimizer: got 'sgd', allowed are adamw, adamw8bit$"):
        replace(CONFIG, optimizer="sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^shard: got True, but adamw8bit takes whole tensors; set optimizer=adamw$"):
        replace(EIGHT, shard=True)


# With the package


def states(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    return [v for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and "qmap" not in k]


def test_the_formula_is_what_the_package_holds() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.zeros(n)) for n in (8192, 5000, 4096, 4095)]
    made = make_optimizer(parameters, "adamw8bit", 1e-3, (0.0, 0.999), 0.0)
    for p in parameters:
        assert storage_bytes(*states(made, p)) == state_bytes([p], "adamw8bit")


def test_it_resumes_bit_for_bit_from_tensors_alone(tmp_path: Path) -> None:
    """Killed after its second checkpoint; the third is that of the straight run."""
    pytest.importorskip("bitsandbytes")
    config: TrainConfig = replace(EIGHT, iterations=6, checkpoint_every=2)
    straight, data = parts()
    list(distill(straight, METHOD, data, config, tmp_path / "straight"))
    killed = distill(parts()[0], METHOD, data, config, tmp_path / "killed")
    for _ in range(4):
        next(killed)
    wait_for(tmp_path / "killed" / "checkpoint-000004")
    kept = tensors(checkpoints(tmp_path / "killed")[-1])
    types = {
        name.rpartition(".")[2]: tensor.dtype
        for name, tensor in kept.items()
        if "optimizer_student" in name and "to_q" in name
    }
    assert types | {"step": types["step"]} == {
        "step": torch.int64,
        "state1": torch.uint8,
        "state2": torch.uint8,
        "qmap1": torch.float32,
        "qmap2": torch.float32,
        "absmax1": torch.float32,
        "absmax2": torch.float32,
    }
    assert any(
        bool((t != t.flatten()[0]).any()) for n, t in kept.items() if n.endswith("state2") and t.dtype == torch.uint8
    )
    resumed, _ = parts()
    assert [s.iteration for s in distill(resumed, METHOD, data, config, tmp_path / "killed")] == [5, 6]
    for role in TRAINED:
        assert all(torch.equal(p, resumed.trained[role][n]) for n, p in straight.trained[role].items())
    first, second = (tensors(checkpoints(tmp_path / run)[-1]) for run in ("straight", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


def test_it_is_adamw_up_to_its_rounding() -> None:
    """A training with it ends near one without, and not at it."""
    pytest.importorskip("bitsandbytes")
    ends = []
    for config in (CONFIG, EIGHT):
        roles, data = parts()
        start = torch.cat([p.detach().flatten() for p in roles.trained["fake"].values()])
        list(distill(roles, METHOD, data, config))
        ends.append(torch.cat([p.detach().flatten() for p in roles.trained["fake"].values()]) - start)
    assert 0 < (ends[1] - ends[0]).norm() < 0.5 * ends[0].norm()
