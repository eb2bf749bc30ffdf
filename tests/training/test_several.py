"""Two and four processes train what one trains: each with all weights, sharded, and sharded within two replicas."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.backbones.context import share_tokens
from fewstep.backbones.parts import blocks_of
from fewstep.training.traffic import Mesh, Work, traffic

from ..project import ROOT
from . import several
from . import test_sharding as common


@lru_cache
def alone(method: str, lora: bool) -> dict[str, Tensor]:
    """What one process trains that takes all batches."""
    return common.weights(several.trained(several.Case(method, lora, False)))


def start(what: str, count: int, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.several", what, str(count), str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def check(case: several.Case, found: dict[str, Tensor]) -> None:
    expected = alone(case.method, case.lora)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6, msg=partial("{}, {}: {}".format, case.name, name)
        )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_does(count: int, tmp_path: Path) -> None:
    start("straight", count, tmp_path)
    for case in several.cases(count):
        check(case, load_file(tmp_path / f"{case.name}.safetensors"))


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    """From one process to four, of which two hold a replica each, to two and to one."""
    for case in several.RESUMED:
        several.stopped(case, tmp_path / "4" / "begun" / case.name)
    for count, after in ((4, 2), (2, 1)):
        start("resume", count, tmp_path / str(count))
        for case in several.RESUMED:
            check(case, load_file(tmp_path / str(count) / f"{case.name}.safetensors"))
            left = tmp_path / str(count) / "left" / case.name
            parts = list(left.glob("checkpoint-*/parts/*.safetensors"))
            assert bool(parts) == case.shard and len({p.name[:11] for p in parts}) in (0, count)
            shutil.copytree(left, tmp_path / str(after) / "begun" / case.name)
    for case in several.RESUMED:
        run = tmp_path / "1" / "begun" / case.name
        damaged = shutil.copytree(run, tmp_path / "damaged" / case.name)
        check(case, common.weights(several.trained(case, run=run)))
        part = next(damaged.glob("checkpoint-*/**/*.safetensors"))
        written = part.read_bytes()
        part.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"is damaged or incomplete \(.*does not have the SHA-256"):
            several.trained(case, run=damaged)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_bytes_sent_are_those_of_the_formula(count: int, tmp_path: Path) -> None:
    start("measure", count, tmp_path)
    for case in several.cases(count):
        if not (path := tmp_path / f"{case.name}.json").exists():
            continue
        found = json.loads(path.read_text())
        method = common.METHODS[several.MEASURED]
        roles = several.roles_of(common.deep(several.Even), method, replace(case, from_first=False), rank=4)
        inside = {id(p) for n in roles.networks.values() for b in blocks_of(n) for p in b.parameters()}
        held = {n: p for n, p in roles.networks["student"].named_parameters() if id(p) in inside}
        own = [(id(p) in inside, p.nbytes) for ps in roles.trained.values() for p in ps.values()]
        mesh = Mesh(case.replicas, count // case.replicas) if case.shard else Mesh(count, 1)
        work = Work(
            blocks=sum(p.nbytes for p in held.values()),
            forward=found["calls"],
            backward=2 * 3,  # two batches; two updates of the fake score and one of the student
            # The fake score has two updates.
            gradients=sum(size for inner, size in own if inner) * 3 // 2,
            sums=1 if case.lora or not case.shard else 2,
            whole=sum(size for inner, size in own if not inner) * 3 // 2,
            # One of three blocks, in every pass of the shared network or in the student's own two.
            strays=sum(p.nbytes for p in held.values()) // 3 * (6 if case.lora else 2),
        )
        expected = traffic(work, mesh)
        assert found["gather"] + found["scatter"] == pytest.approx(expected.within, rel=1e-9), case.name
        assert found["sum"] == pytest.approx(expected.across + expected.everywhere, rel=1e-9), case.name


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_neighbours_that_share_tokens_train_what_one_does(count: int, tmp_path: Path) -> None:
    start("context", count, tmp_path)
    one = common.trained(several.video(), common.METHODS[several.MEASURED], config=several.VIDEO)
    for rank in range(count):
        for found, expected in zip(json.loads((tmp_path / f"{rank}.json").read_text()), one, strict=True):
            grads = {k: v for k, v in expected.items() if k.endswith("_grad")}
            assert {k: found[k] for k in grads} == pytest.approx(grads, rel=1e-4)


class Pair:
    """A mesh of two processes, as far as a network's refusal looks at it."""

    def __getitem__(self, _: str) -> "Pair":
        return self

    def size(self) -> int:
        return 2


def test_networks_that_diffusers_does_not_share_are_refused() -> None:
    cog = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8,
    )  # fmt: skip
    for network in (cog, nn.Linear(2, 2)):
        kind = type(network).__name__
        said = rf"^train.context: got 2, but diffusers [\d.]+ does not share the tokens of a {kind} \(it has no plan"
        with pytest.raises(ValueError, match=said):
            share_tokens(network, Pair(), torch.device("cpu"))  # type: ignore[arg-type]


def test_processes_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^replicas: got 2, which are replicas of sharded weights; set shard=True"):
        replace(several.CONFIG, replicas=2)
    with pytest.raises(ValueError, match=r"^context: got 2, which needs .* set shard=True"):
        replace(several.CONFIG, context=2)
    config = replace(several.CONFIG, context=2, shard=True)
    with pytest.raises(ValueError, match=r"^train.context: got 2, allowed are divisors of the number of processes, 3"):
        config.on(3)
    assert config.on(8).accumulate == 2 and config.on(1).accumulate == 8


def test_other_batches_train_something_else() -> None:
    """The comparison above would see a process that takes the batches of another."""
    one = several.trained(several.Case("unify", True, False), replace(several.CONFIG, global_batch=2))
    apart = [float((t - common.weights(one)[n]).abs().max()) for n, t in alone("unify", True).items()]
    assert max(apart) > 1e-4
